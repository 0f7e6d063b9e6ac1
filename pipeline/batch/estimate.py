"""How long a job will take: first by a rough rule, then by what finished jobs took on this machine.

A job's time is a sum of parts, each proportional to something that its plan knows. The time that finished jobs took for
a part, divided by what the rule said, corrects the rule for later jobs: from jobs of the same backend and verification
where there are any, else from all.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.backends.registry import choose_backend
from pipeline.batch.planning import JobPlan

# The rough rule, for a machine with an NVMe drive and 2 cores or one GPU; what finished jobs took corrects it.
STARTING = {False: 1.0, True: 6.0}  # seconds: a data-free job imports no torch
STREAM = 500e6  # bytes a second
LAYERS = {"cpu": 300e6, "cuda": 1e9}
FORWARDS = {"cpu": 1.5e11, "cuda": 1e14}  # floating-point operations a second
BATCH = {"cpu": 0.01, "cuda": 0.002}  # seconds per layer and batch, however small
VERIFY = {"structure": 0.3, "load": 20.0, "generate": 60.0}
ENGINE = 200e6  # bytes a second: the engine loads the result twice, and the source

FADING = 0.5  # weight of a job relative to the one after it: the speed of a shared machine changes

Key = tuple[str, ...]


def rule(plan: JobPlan) -> dict[str, float]:
    """The seconds of each part of a job, by the rough rule."""
    calibrated = plan.layers > 0
    left = 1.0 - plan.done
    parts = {
        "start": STARTING[calibrated],
        "stream": plan.stream_bytes / STREAM * left,
        "verify": VERIFY[plan.verify] + (plan.source_bytes / ENGINE if plan.verify == "generate" else 0.0),
    }
    if calibrated:
        backend = choose_backend(plan.recipe)
        flops = plan.tokens * plan.layer_bytes  # two operations per weight, of two bytes
        forwards = flops / FORWARDS[plan.device] + plan.batches * plan.layers * BATCH[plan.device]
        parts["imports"] = backend.import_seconds
        parts["weights"] = plan.layer_bytes / LAYERS[plan.device] * left
        parts["forwards"] = forwards * left * backend.forward_cost
    return parts


def measured(events: Iterable[Mapping[str, Any]], began: float, ended: float) -> dict[str, float] | None:
    """The seconds that each part of a whole run took; None for a run that was resumed or did not end.

    Args:
        events: the events of its events.jsonl.
        began: when its process started, in seconds since the epoch.
        ended: when it ended, in seconds since the epoch.
    """
    at: dict[str, float] = {}
    weights = forwards = first = 0.0
    for event in events:
        kind = event.get("event", "")
        if kind == "run" and (event["done"] or "run" in at):
            return None
        if kind == "layer":
            first = first or min(event["load"][0], event["read"][0])
            weights += sum(event[stage][1] - event[stage][0] for stage in ("load", "quantize") if stage in event)
            forwards += event["forward"][1] - event["forward"][0]
        at.setdefault(kind, event["time"])
    if "run" not in at or "streamed" not in at or not at["run"] >= began:
        return None
    parts = {"start": at["run"] - began, "verify": ended - at["streamed"]}
    if "layer" not in at:
        parts["stream"] = at["streamed"] - at["run"]
        return parts
    imports = at.get("imports", first)
    parts["stream"] = max(0.0, at.get("unit", at["run"]) - at["run"])
    parts["imports"] = max(0.0, imports - at["run"] - parts["stream"])
    parts["forwards"] = forwards
    parts["weights"] = max(weights, at["streamed"] - imports - forwards)  # including waits for the drive
    return parts


class Estimator:
    """Estimates that learn from each finished job."""

    def __init__(self) -> None:
        self._seen: dict[Key, list[tuple[float, float]]] = defaultdict(list)  # (seconds taken, seconds by the rule)
        self._errors: list[float] = []

    def learn(self, plan: JobPlan, parts: Mapping[str, float]) -> None:
        """Take in the seconds of a whole run's parts, as `measured` gave them."""
        ruled = rule(replace(plan, done=0.0))
        for part, seconds in parts.items():
            if ruled.get(part, 0.0) > 0:
                for key in _keys(part, plan):
                    self._seen[key].append((seconds, ruled[part]))

    def seconds(self, plan: JobPlan) -> float:
        """The seconds from the start of a job's process to its end; zero if it is published already."""
        if plan.already:
            return 0.0
        return sum(seconds * self._correction(part, plan) for part, seconds in rule(plan).items())

    def _correction(self, part: str, plan: JobPlan) -> float:
        for key in _keys(part, plan):
            if seen := self._seen.get(key):
                weights = [FADING**age for age in reversed(range(len(seen)))]
                taken = sum(weight * taken for weight, (taken, _) in zip(weights, seen, strict=True))
                return taken / sum(weight * ruled for weight, (_, ruled) in zip(weights, seen, strict=True))
        return 1.0

    @property
    def informed(self) -> bool:
        """Whether a job of this machine has been seen."""
        return bool(self._seen)

    def judge(self, estimate: float, taken: float) -> None:
        """Remember how far an estimate that was made after the first job was off; both in seconds."""
        self._errors.append(abs(estimate - taken) / taken)

    def errors(self) -> dict[str, Any] | None:
        """How far estimates were off, as shares of the time taken; None before there are any."""
        if not self._errors:
            return None
        return {
            "jobs": len(self._errors),
            "median_error": statistics.median(self._errors),
            "worst_error": max(self._errors),
        }


def _keys(part: str, plan: JobPlan) -> tuple[Key, ...]:
    """What a part's time depends on besides its size, from the most similar jobs to any."""
    calibrated, backend = "calibrated" if plan.layers else "data-free", plan.recipe.backend
    if part == "verify":
        return (part, plan.verify, calibrated, backend), (part, plan.verify, calibrated)
    return (part, backend, calibrated, plan.device), (part, calibrated, plan.device)
