"""The gates that a result passes before it is published: functions that take a candidate and return a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint.source import Checkpoint
from pipeline.recipe.recipe import Recipe
from pipeline.verify.report import Report
from pipeline.verify.structure import check_structure, empty_report
from pipeline.verify.verify import check_in_vllm
from pipeline.vllm_env.worker import VllmWorker


@dataclass
class Candidate:
    """A result on its way through the gates.

    Attributes:
        directory: where it is now.
        source: what it was made from.
        recipe: what it was made by; ``verify`` says how far the gates go.
        worker: runs vLLM; None where the recipe does not ask for it, or there is none.
        say: told what is under way.
        truncated: the result of a smoke test, which is not kept: its bytes are not read back, and vLLM's engine
            answers a prompt when it is loaded.
        report: what the gates have found so far, about the checkpoint under the name that it will have.
    """

    directory: Path
    source: Checkpoint
    recipe: Recipe
    worker: VllmWorker | None
    say: Callable[[str], None]
    truncated: bool = False
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.report = empty_report(self.directory, self.source)
        self.report.checkpoint = Path(self.recipe.output).name


Gate = Callable[[Candidate], Report]


def structure(candidate: Candidate) -> Report:
    """The files: headers, index, config, scales, and the account of every source tensor."""
    return check_structure(candidate.directory, candidate.source)


def vllm(candidate: Candidate) -> Report:
    """vLLM itself: its loader, and its engine's answers where ``verify`` asks for them."""
    return check_in_vllm(
        candidate.directory,
        candidate.source,
        candidate.recipe.verify,
        candidate.worker,
        candidate.report,
        say=candidate.say,
        engine=candidate.truncated,
        read_bytes=not candidate.truncated,
    )


GATES: tuple[Gate, ...] = (structure, vllm)


def pass_gates(candidate: Candidate, gates: Sequence[Gate] = GATES) -> Report:
    """Send a candidate through the gates, one after the other, and return what all of them found.

    Every gate sees what those before it found (``candidate.report``) and decides itself what that spares it.
    """
    for gate in gates:
        candidate.report.merge(gate(candidate))
    return candidate.report
