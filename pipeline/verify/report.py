"""What a verification found: findings as data, in a report that knows whose checkpoint it is about."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pipeline.verify.codes import CODES, FindingLevel

NOT_QUANTIZED = "not-quantized"
LEVELS = ("structure", "load", "generate")  # of `verify`, each further than the one before


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        code: what kind of thing, a key of `CODES`.
        subject: the tensor, module, file, part of the config, option or prompt that it is about, the first where there
            are several; empty for the checkpoint as a whole.
        text: a sentence that says it; it names the subject itself.
        remedy: what to do about it; None where nothing general can be said.
        covers: the tensors that it is about, where `subject` names what they belong to.
    """

    code: str
    subject: str
    text: str
    remedy: str | None = None
    covers: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The line for a reader."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


@dataclass
class Report:
    """What was checked, and what was found.

    Attributes:
        checkpoint: its directory, or the name it will have.
        source: what it was held against.
        produced_here: whether this tool produced the checkpoint, which decides on the level of findings.
        checked: what is in order, a sentence each.
        findings: problems and notes, in the order in which they were found.
        proven_in_vllm: whether vLLM itself said yes, at `level` load or generate.
        level: how far the checks came.
        asked: how far they were to come.
        vllm: what vLLM said, as plain data; empty without it.
        library_config: whether the run wrote its library's own config (``exact: true``), which names modules as third
            parties do.
    """

    checkpoint: str
    source: str | None
    produced_here: bool = False
    checked: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    proven_in_vllm: bool = False
    level: str = "structure"
    asked: str = "structure"
    vllm: dict[str, Any] = field(default_factory=dict)
    library_config: bool = False

    def add(self, code: str, subject: str, text: str, remedy: str | None = None) -> None:
        """Add a finding, unless `CODES` says that it is not looked for in such a checkpoint.

        Raises:
            KeyError: `CODES` does not have the code.
        """
        self.take(Finding(code, subject, text, remedy))

    def take(self, finding: Finding) -> None:
        """As `add`, of a finding that is there already."""
        if self.level_of(finding) is not None:
            self.findings.append(finding)

    def merge(self, other: Report) -> None:
        """Add what another report on the same checkpoint holds; a problem of either ends the word of vLLM."""
        self.checked += other.checked
        self.findings += other.findings
        self.level = max(self.level, other.level, key=LEVELS.index)
        self.asked = max(self.asked, other.asked, key=LEVELS.index)
        self.vllm = {**self.vllm, **other.vllm}
        self.proven_in_vllm = (self.proven_in_vllm or other.proven_in_vllm) and self.passed

    def beside(self) -> Report:
        """An empty report on the same checkpoint, for what is not known to belong here."""
        return Report(self.checkpoint, self.source, self.produced_here, library_config=self.library_config)

    def level_of(self, finding: Finding) -> FindingLevel | None:
        """Whether a finding is a problem in this checkpoint, or a note."""
        return CODES[finding.code].level(self.produced_here)

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        return [finding.sentence for finding in self.findings if self.level_of(finding) == "problem"]

    @property
    def notes(self) -> list[str]:
        """What a careful user should know, a sentence each."""
        return [finding.sentence for finding in self.findings if self.level_of(finding) == "note"]

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    @property
    def not_quantized(self) -> str | None:
        """What says that nothing is quantized in it; None where something is, or its config cannot be read."""
        return next((finding.text for finding in self.findings if finding.code == NOT_QUANTIZED), None)

    def as_json(self) -> dict[str, Any]:
        """Plain data, as quantize/verify.json holds it; JSON has no NaN and no infinity, which become words."""
        made: dict[str, Any] = _plain(
            {
                "checkpoint": self.checkpoint,
                "source": self.source,
                "passed": self.passed,
                "quantized": self.not_quantized is None,
                "checked": self.checked,
                "problems": self.problems,
                "notes": self.notes,
                "findings": [
                    {
                        "code": finding.code,
                        "level": self.level_of(finding),
                        "subject": finding.subject,
                        "text": finding.text,
                        "remedy": finding.remedy,
                    }
                    for finding in self.findings
                ],
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
