"""How long a run takes: by a rough rule, by what finished runs took, or by what its first layers took.

A run's time is a sum of parts, each proportional to quantities that the plan knows (`Work`). Three callers share them:
``quantize plan`` shows the rule; a batch corrects it by what its finished jobs took (`Estimator`); a smoke test scales
what it measured to all layers (`scale`). The parts, in the order of a run:

- ``start``: from the start of the process to the first byte, planning included.
- ``imports``: torch, transformers and the quantization library, where there are layers to calibrate.
- ``stream``: reading, quantizing and writing what needs no data.
- ``weights``: the same of calibrated layers, including waits for the drive.
- ``forwards``: the batches through the layers.
- ``verify``: everything after the last tensor.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.checkpoint.result import EVENTS, places
from pipeline.events import read_events
from pipeline.identity import compare
from pipeline.journal import read_pieces, read_record
from pipeline.plan.disk import scratch_need
from pipeline.plan.plan import Plan
from pipeline.report.outcome import Estimate, Outcome

# The rough rule, for a machine with an NVMe drive and 2 cores or one GPU; what finished runs took corrects it.
STARTING = {False: 1.0, True: 6.0}  # seconds: a data-free run imports no torch
STREAM = 500e6  # bytes a second
LAYERS = {"cpu": 300e6, "cuda": 1e9}
FORWARDS = {"cpu": 1.5e11, "cuda": 1e14}  # floating-point operations a second
BATCH = {"cpu": 0.01, "cuda": 0.002}  # seconds per layer and batch, however small
VERIFY = {"structure": 0.3, "load": 20.0, "generate": 60.0}
ENGINE = 200e6  # bytes a second: the engine loads the result twice, and the source

FADING = 0.5  # weight of a run relative to the one after it: the speed of a shared machine changes

Key = tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """The quantities of a run that its time depends on. Sizes are in bytes.

    Attributes:
        backend: its name.
        import_seconds: see `Backend`.
        forward_cost: see `Backend`.
        device: what layers run on, ``cpu`` or ``cuda``.
        verify: the level that can be reached; ``structure`` where vLLM is not installed.
        source_bytes: size of the source's shards.
        stream_bytes: source bytes outside calibrated layers.
        layer_bytes: source bytes in calibrated layers.
        layers: how many layers are calibrated.
        tokens: calibration tokens.
        batches: calibration batches.
        done: the share of the result that a stopped run has finished, 0 to 1.
    """

    backend: str
    import_seconds: float
    forward_cost: float
    device: str
    verify: str
    source_bytes: int
    stream_bytes: int
    layer_bytes: int
    layers: int
    tokens: int
    batches: int
    done: float = 0.0

    @classmethod
    def of(cls, plan: Plan, verify: str | None = None) -> Work:
        """What a plan leaves to do, beside what a stopped run of its identity has finished.

        Args:
            plan: the run's.
            verify: the level that can be reached; None: what the recipe asks for.
        """
        calibration, backend = plan.calibration, plan.backend
        return cls(
            backend=backend.name,
            import_seconds=backend.import_seconds,
            forward_cost=backend.forward_cost,
            device=calibration.device.kind if calibration else "cpu",
            verify=plan.recipe.verify if verify is None else verify,
            source_bytes=plan.checkpoint.nbytes,
            stream_bytes=sum(piece.nbytes for piece in plan.pieces),
            layer_bytes=sum(layer.nbytes for layer in plan.layers),
            layers=len(plan.layers),
            tokens=calibration.batches.tokens if calibration else 0,
            batches=len(calibration.batches.batches) if calibration else 0,
            done=_finished_share(plan),
        )

    @property
    def calibrated(self) -> bool:
        """Whether batches run through layers."""
        return self.layers > 0

    @property
    def read_bytes(self) -> int:
        """Source bytes that a whole run reads."""
        return self.stream_bytes + self.layer_bytes


def _finished_share(plan: Plan) -> float:
    """The share of the result that a stopped run of this identity has finished."""
    partial = places(plan.recipe.output)[1]
    begun = read_record(partial)
    if begun is None or compare(begun, plan.identity).fields:
        return 0.0
    try:
        pieces = read_pieces(partial) or []
    except ValueError:
        return 0.0
    return min(1.0, sum(piece.nbytes for piece in pieces) / max(1, plan.output_nbytes))


# --- the rough rule ----------------------------------------------------------------------------------


def rule(work: Work) -> dict[str, float]:
    """The seconds of each part of a run, by the rough rule."""
    left = 1.0 - work.done
    parts = {"start": STARTING[work.calibrated]}
    if work.calibrated:
        parts["imports"] = work.import_seconds
    parts["stream"] = work.stream_bytes / STREAM * left
    if work.calibrated:
        flops = work.tokens * work.layer_bytes  # two operations per weight, of two bytes
        forwards = flops / FORWARDS[work.device] + work.batches * work.layers * BATCH[work.device]
        parts["weights"] = work.layer_bytes / LAYERS[work.device] * left
        parts["forwards"] = forwards * left * work.forward_cost
    parts["verify"] = VERIFY[work.verify] + (work.source_bytes / ENGINE if work.verify == "generate" else 0.0)
    return parts


def estimate_by_rule(plan: Plan, verify: str) -> Estimate:
    """What a run, or the rest of a stopped one, takes by the rough rule; `verify`: the level that can be reached."""
    parts = rule(Work.of(plan, verify))
    return Estimate(sum(parts.values()), parts)


# --- what finished runs took -------------------------------------------------------------------------


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
            weights += sum(_took(event, stage) for stage in ("load", "quantize") if stage in event)
            forwards += _took(event, "forward")
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


def _took(event: Mapping[str, Any], stage: str) -> float:
    begin, end = event[stage]
    return float(end - begin)


class Estimator:
    """Estimates that learn from each finished run.

    What finished runs took for a part, divided by what the rule said, corrects the rule for later runs: from runs of
    the same backend and verification where there are any, else from all.
    """

    def __init__(self) -> None:
        self._seen: dict[Key, list[tuple[float, float]]] = defaultdict(list)  # (seconds taken, seconds by the rule)
        self._errors: list[float] = []

    def learn(self, work: Work, parts: Mapping[str, float]) -> None:
        """Take in the seconds of a whole run's parts, as `measured` gave them."""
        ruled = rule(replace(work, done=0.0))
        for part, seconds in parts.items():
            if ruled.get(part, 0.0) > 0:
                for key in _keys(part, work):
                    self._seen[key].append((seconds, ruled[part]))

    def seconds(self, work: Work) -> float:
        """The seconds from the start of a run's process to its end."""
        return sum(seconds * self._correction(part, work) for part, seconds in rule(work).items())

    def _correction(self, part: str, work: Work) -> float:
        for key in _keys(part, work):
            if seen := self._seen.get(key):
                weights = [FADING**age for age in reversed(range(len(seen)))]
                taken = sum(weight * taken for weight, (taken, _) in zip(weights, seen, strict=True))
                return taken / sum(weight * ruled for weight, (_, ruled) in zip(weights, seen, strict=True))
        return 1.0

    @property
    def informed(self) -> bool:
        """Whether a run on this machine has been seen."""
        return bool(self._seen)

    def judge(self, estimate: float, taken: float) -> None:
        """Remember how far an estimate that was made after the first run was off; both in seconds."""
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


def _keys(part: str, work: Work) -> tuple[Key, ...]:
    """What a part's time depends on besides its size, from the most similar runs to any."""
    calibrated = "calibrated" if work.calibrated else "data-free"
    if part == "verify":
        return (part, work.verify, calibrated, work.backend), (part, work.verify, calibrated)
    return (part, work.backend, calibrated, work.device), (part, calibrated, work.device)


# --- what a smoke test measured ----------------------------------------------------------------------


def estimate_from_smoke(plan: Plan, outcome: Outcome, reading: float, imports: float) -> Estimate:
    """What the whole run takes, verification and start aside, by what a smoke test of it has measured.

    Args:
        plan: of the whole run.
        outcome: of the smoke test.
        reading: bytes a second that the source's drive gives.
        imports: seconds that imports took.
    """
    events = list(read_events(outcome.output / EVENTS))
    parts = scale(Work.of(plan), events, reading, imports)
    layers = [event for event in events if event["event"] == "layer"]
    device = max((event["device_bytes"] for event in layers), default=0)
    if layers and plan.calibration is not None and plan.calibration.place == "device":
        device += plan.calibration.needs.hidden
    return Estimate(
        sum(parts.values()),
        parts,
        "smoke",
        (outcome.totals.peak_rss_bytes, plan.peak_memory),
        (plan.output_nbytes, scratch_need(plan)),
        device,
        reading,
    )


def scale(work: Work, events: Sequence[Mapping[str, Any]], reading: float, imports: float) -> dict[str, float]:
    """The seconds of each part, from its first layers: bytes by the rates seen, forwards by batches and tokens.

    Reading is counted at no more than the drive's own rate: the truncated source was still in the page cache.

    Args:
        work: the whole run's; what a stopped run has finished is not taken off.
        events: of the run over the first layers.
        reading: bytes a second that the source's drive gives.
        imports: seconds that imports took.
    """
    parts: dict[str, float] = {}
    layers = [event for event in events if event["event"] == "layer"]
    if layers and work.calibrated:
        parts["imports"] = imports
    if pieces := [event for event in events if event["event"] == "piece"]:
        span = max(event["write"][1] for event in pieces) - min(event["read"][0] for event in pieces)
        read = sum(event["bytes_read"] for event in pieces)
        parts["stream"] = work.stream_bytes / min(read / max(span, 1e-6), reading)
    if layers and work.calibrated:
        parts["weights"], parts["forwards"] = _scale_layers(work, layers, reading)
    return parts


def _scale_layers(work: Work, layers: Sequence[Mapping[str, Any]], reading: float) -> tuple[float, float]:
    """The weights and the forwards of all layers, at the pace of those like the last.

    What the first one took longer, for caches and kernels, is counted once.
    """
    nbytes = layers[-1]["bytes_read"]
    # a layer takes from the end of the one before to its own: what lies between their stages counts as well
    begins = [layers[0]["load"][0], *(layer["quantize"][1] for layer in layers)]
    spans: list[float] = [layer["quantize"][1] - begin for begin, layer in zip(begins, layers, strict=False)]
    alike = [n for n, layer in enumerate(layers) if layer["bytes_read"] == nbytes and (n or len(layers) == 1)]
    forwards = [_took(layers[number], "forward") for number in alike]
    around = statistics.median(spans[number] - seconds for number, seconds in zip(alike, forwards, strict=True))
    if layers[-1].get("timed_batches"):
        forward = forward_seconds([layers[number]["timed_batches"] for number in alike], work.batches, work.tokens)
    else:  # on a GPU, with nearly as many captions
        forward = statistics.median(forwards) * work.tokens / max(1, int(layers[-1]["tokens"]))
    writing = statistics.median(_took(layers[number], "write") for number in alike)
    count = work.layer_bytes / max(1, nbytes)
    warming = max(0.0, spans[0] - statistics.median(spans[number] for number in alike))
    if layers[0]["bytes_read"] != nbytes:  # another kind of layer, of which it tells nothing
        warming = 0.0
    whole = max(nbytes / reading, around + forward, writing) * count + warming
    return whole - forward * count, forward * count


def forward_seconds(layers: Sequence[Sequence[tuple[int, float]]], batches: int, tokens: int) -> float:
    """The forwards of a layer over all batches: so much a batch and so much a token, neither below nothing.

    Theil and Sen's line, the median over all pairs, which a few batches that something disturbed do not turn.

    Args:
        layers: tokens and seconds of each batch, the same batches in every layer.
        batches: of the whole run.
        tokens: in all of them.
    """
    points: list[tuple[int, float]] = [
        (each[0][0], statistics.median(seconds for _, seconds in each)) for each in zip(*layers, strict=True)
    ]
    slopes = [
        (late - early) / (many - few)
        for number, (few, early) in enumerate(points)
        for many, late in points[number + 1 :]
        if many != few
    ]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    base = statistics.median(seconds - slope * count for count, seconds in points)
    if base < 0 or not slopes:  # through nothing: all of it is the tokens'
        base, slope = 0.0, statistics.median(seconds / count for count, seconds in points)
    return base * batches + slope * tokens
