"""One sentence about the machine, its status and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "unfit"]


@dataclass(frozen=True)
class Finding:
    """One sentence about the machine.

    Attributes:
        area: what it is about, a word.
        status: ``ok``; ``note``, good to know; ``warning``, the run works but worse; ``unfit``, it will not work.
        text: the sentence.
        remedy: what to do; None where nothing needs to be done.
    """

    area: str
    status: Status
    text: str
    remedy: str | None = None
