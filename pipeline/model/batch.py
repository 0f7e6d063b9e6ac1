"""A token batch: what a forward is called with."""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """`rows` sequences of `length` tokens, one after the other in `ids`."""

    rows: int
    length: int
    ids: array[int]

    @property
    def tokens(self) -> int:
        """How many positions a forward computes."""
        return self.rows * self.length
