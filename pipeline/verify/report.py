"""What a verification found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """What was checked, and what is wrong.

    Attributes:
        checkpoint: its directory, or the name it will have.
        source: what it was held against.
        checked: what is in order, a sentence each.
        problems: what is wrong.
        notes: what a careful user should know.
        proven_in_vllm: whether vLLM itself said yes, at `level` load or generate.
        level: how far the checks came.
        asked: how far they were to come.
        vllm: what vLLM said, as plain data; empty without it.
    """

    checkpoint: str
    source: str | None
    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proven_in_vllm: bool = False
    level: str = "structure"
    asked: str = "structure"
    vllm: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain data, as quantize/verify.json holds it; JSON has no NaN and no infinity, which become words."""
        made: dict[str, Any] = _plain(
            {
                "checkpoint": self.checkpoint,
                "source": self.source,
                "passed": self.passed,
                "checked": self.checked,
                "problems": self.problems,
                "notes": self.notes,
                "proven_in_vllm": self.proven_in_vllm,
                "level": self.level,
                "asked": self.asked,
                "vllm": self.vllm,
            }
        )
        return made


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
