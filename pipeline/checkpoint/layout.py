"""The result's files as planned: every tensor's place, every shard's header."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the result: its place in output shard `shard`, `offset` from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class OutputShard:
    """A file of the result: its whole header is known."""

    name: str
    header: bytes  # with the length prefix
    size: int
