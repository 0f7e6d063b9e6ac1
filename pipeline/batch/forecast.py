"""How long a job will take: first by a rough rule, then by what this machine has shown.

A job's time is a sum of parts, each in proportion to something that its plan knows. What finished jobs took for a part,
over what the rule said, corrects the rule for the jobs that come: of the same backend and verification where there was
one, else of any.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.batch.planning import Facts

# The rough rule, of a machine with an NVMe drive and 2 cores or one GPU; a job's own figures replace it.
STARTING = {False: 1.0, True: 6.0}  # seconds: a data-free job imports no torch
IMPORTS = {"modelopt": 5.0, "llmcompressor": 0.2}
OBSERVED = {"modelopt": 1.0, "llmcompressor": 0.6}  # a forward with ranges of every linear, or of caches alone
STREAM = 500e6  # bytes a second
LAYERS = {"cpu": 300e6, "cuda": 1e9}
FORWARDS = {"cpu": 1.5e11, "cuda": 1e14}  # floating-point operations a second
BATCH = {"cpu": 0.01, "cuda": 0.002}  # seconds a layer and batch, however small
VERIFY = {"structure": 0.3, "load": 20.0, "generate": 60.0}
ENGINE = 200e6  # bytes a second: the engine loads the result twice, and the source

FADING = 0.5  # weight of a job against the one after it: a shared machine is now faster, now slower

Key = tuple[str, ...]


def rule(facts: Facts) -> dict[str, float]:
    """Seconds of each part by the rough rule."""
    calibrated = facts.layers > 0
    left = 1.0 - facts.done
    parts = {
        "start": STARTING[calibrated],
        "stream": facts.read_bytes / STREAM * left,
        "verify": VERIFY[facts.verify] + (facts.source_bytes / ENGINE if facts.verify == "generate" else 0.0),
    }
    if calibrated:
        flops = facts.tokens * facts.layer_bytes  # two operations a weight, of two bytes
        parts["imports"] = IMPORTS[facts.backend]
        parts["weights"] = facts.layer_bytes / LAYERS[facts.device] * left
        parts["forwards"] = flops / FORWARDS[facts.device] + facts.batches * facts.layers * BATCH[facts.device]
        parts["forwards"] *= left * OBSERVED[facts.backend]
    return parts


def measured(events: Iterable[Mapping[str, Any]], began: float, ended: float) -> dict[str, float] | None:
    """Seconds of each part of a whole run; None where its record is of more than one attempt, or not whole.

    Args:
        events: of its events.jsonl.
        began: when its process was started, seconds since the epoch.
        ended: when it ended.
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
    parts["weights"] = max(weights, at["streamed"] - imports - forwards)  # with what it waited for the drive
    return parts


@dataclass
class Forecaster:
    """Forecasts that learn from each finished job."""

    _seen: dict[Key, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    _errors: list[float] = field(default_factory=list)

    def learn(self, facts: Facts, parts: Mapping[str, float]) -> None:
        """A whole run's parts, as `measured` gave them."""
        ruled = rule(facts)
        for part, seconds in parts.items():
            if ruled.get(part, 0.0) > 0:
                for key in _keys(part, facts):
                    self._seen[key].append((seconds, ruled[part]))

    def seconds(self, facts: Facts) -> float:
        """Of a job, from its process's start to its end; zero if it is published already."""
        if facts.already:
            return 0.0
        return sum(seconds * self._correction(part, facts) for part, seconds in rule(facts).items())

    def _correction(self, part: str, facts: Facts) -> float:
        for key in _keys(part, facts):
            if seen := self._seen.get(key):
                weights = [FADING ** (len(seen) - 1 - place) for place in range(len(seen))]
                taken = sum(weight * taken for weight, (taken, _) in zip(weights, seen, strict=True))
                return taken / sum(weight * ruled for weight, (_, ruled) in zip(weights, seen, strict=True))
        return 1.0

    @property
    def informed(self) -> bool:
        """Whether a job of this machine has been seen."""
        return bool(self._seen)

    def judge(self, forecast: float, taken: float) -> None:
        """Remember how far a forecast that was made after the first job was off."""
        self._errors.append(abs(forecast - taken) / taken)

    def errors(self) -> dict[str, Any] | None:
        """How far forecasts were off, as shares of the time taken; None before there are any."""
        if not self._errors:
            return None
        return {
            "jobs": len(self._errors),
            "median_error": statistics.median(self._errors),
            "worst_error": max(self._errors),
        }


def _keys(part: str, facts: Facts) -> tuple[Key, ...]:
    """From the most alike to any: what a part's time depends on besides its size."""
    calibrated = "calibrated" if facts.layers else "data-free"
    if part == "verify":
        return (part, facts.verify, calibrated, facts.backend), (part, facts.verify, calibrated)
    return (part, facts.backend, calibrated, facts.device), (part, calibrated, facts.device)
