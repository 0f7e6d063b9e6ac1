"""How a run or a smoke test ended, as plain data: runs fill it in, the console and the pages show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PipelineError
from pipeline.plan.disk import DiskUse
from pipeline.stream.totals import Totals
from pipeline.verify.report import Report

OutlookState = Literal["new", "begun", "published", "refused"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended that did not fail.

    Attributes:
        output: the published directory.
        already: it was there before, from an identical run.
        layers: timings, slowest first.
        totals: what this process read, ran and wrote; zero where all was done before.
        report: of the verification; None if `already`, and validated far enough before.
        findings: what the observed amax says, for a careful user.
        seconds: of the whole run, from its plan to its publication.
        sizes: bytes of the source's tensors, and of the result's.
        serve: the command that serves it, word by word.
    """

    output: Path
    already: bool
    layers: list[dict[str, Any]]
    totals: Totals
    report: Report | None
    findings: tuple[str, ...] = ()
    seconds: float = 0.0
    sizes: tuple[int, int] = (0, 0)
    serve: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What a run will take; by the rough rule its time alone, after a smoke test memory and disk as well.

    Attributes:
        seconds: of all parts.
        parts: seconds by part, see `run/estimate.py`.
        basis: what it comes from: the rough rule, or what a smoke test measured.
        memory: peak of this process that was measured, and the plan's bound for the whole run, in bytes.
        disk: of the result, and of hidden states while it runs, in bytes.
        device: of the GPU's memory at most, in bytes; 0 without one.
        reading: bytes a second that the source's drive gives, past the page cache.
    """

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    basis: Literal["rule", "smoke"] = "rule"
    memory: tuple[int, int] = (0, 0)
    disk: tuple[int, int] = (0, 0)
    device: int = 0
    reading: float = 0.0


@dataclass(frozen=True)
class Outlook:
    """What a run would find at its output now.

    Attributes:
        state: ``new``: it begins; ``begun``: it goes on where another stopped; ``published``: this very result is
            there; ``refused``: what is at the output stands in its way.
        notes: what the run would make of it, for a person.
        units_done: that an earlier run of this recipe has finished.
        disk: what it takes of the drives.
        refusal: what ends the run wherever its output stands: the disk is too small. None where nothing does.
        differences: from the run that stands there, as plain data; see `pipeline.errors.OtherRun`.
    """

    state: OutlookState
    notes: tuple[str, ...]
    units_done: int
    disk: DiskUse
    refusal: PipelineError | None
    differences: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Smoke:
    """How a smoke test ended.

    Attributes:
        layers: how many of how many.
        report: of the truncated result.
        estimate: of the whole run; None where something failed.
        refusals: what the whole run would end with before its start; empty where it would start.
        kept: where the truncated source and result were left; None where they were removed.
        seconds: of the smoke test.
    """

    layers: tuple[int, int]
    report: Report
    estimate: Estimate | None
    refusals: tuple[PipelineError, ...]
    kept: Path | None
    seconds: float
