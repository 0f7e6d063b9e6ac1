"""How long a whole run will take, from what its first layers took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline.checkpoint.result import EVENTS
from pipeline.events import read_events
from pipeline.plan.plan import Plan
from pipeline.report.outcome import Estimate, Outcome


def estimate_run(plan: Plan, outcome: Outcome, reading: float, imports: float) -> Estimate:
    """Scale what was measured: bytes by the rates seen, forwards by batches and tokens, layers by their number.

    Reading is counted at no more than the drive's own rate: the truncated source was still in the page cache.
    """
    events = list(read_events(outcome.output / EVENTS))
    parts: dict[str, float] = {}
    pieces = [event for event in events if event["event"] == "piece"]
    if pieces:
        span = max(event["write"][1] for event in pieces) - min(event["read"][0] for event in pieces)
        read = sum(event["bytes_read"] for event in pieces)
        parts["weights that need no data"] = sum(piece.nbytes for piece in plan.pieces) / min(
            read / max(span, 1e-6), reading
        )
    device = hidden = 0
    runs = [event for event in events if event["event"] == "layer"]
    if runs and plan.calibration is not None:
        parts["layers"] = _layers_seconds(runs, plan, reading)
        parts["imports"] = imports
        device = max(event["device_bytes"] for event in runs)
        if plan.calibration.place == "device":
            device += plan.calibration.needs.hidden
    if plan.calibration is not None:
        hidden = plan.calibration.needs.hidden * (3 if plan.calibration.place == "file" else 2)
    return Estimate(
        sum(parts.values()),
        parts,
        (outcome.totals.peak_rss_bytes, plan.peak_memory),
        (plan.output_nbytes, hidden),
        device,
        reading,
    )


def _layers_seconds(runs: list[dict[str, Any]], plan: Plan, reading: float) -> float:
    """All layers at the pace of those like the last; what the first one took longer, for caches and kernels, once."""
    assert plan.calibration is not None
    batches, nbytes = plan.calibration.batches, runs[-1]["bytes_read"]
    # a layer takes from the end of the one before to its own: what lies between their stages counts as well
    begins = [runs[0]["load"][0], *(run["quantize"][1] for run in runs)]
    spans: list[float] = [run["quantize"][1] - begin for begin, run in zip(begins, runs, strict=False)]
    alike = [number for number, run in enumerate(runs) if run["bytes_read"] == nbytes and (number or len(runs) == 1)]
    forwards: list[float] = [runs[number]["forward"][1] - runs[number]["forward"][0] for number in alike]
    around = statistics.median(spans[number] - seconds for number, seconds in zip(alike, forwards, strict=True))
    if runs[-1].get("timed_batches"):
        timed = [runs[number]["timed_batches"] for number in alike]
        forward = forward_seconds(timed, len(batches.batches), batches.tokens)
    else:  # on a GPU, with nearly as many captions
        forward = statistics.median(forwards) * batches.tokens / max(1, int(runs[-1]["tokens"]))
    writing: float = statistics.median(runs[number]["write"][1] - runs[number]["write"][0] for number in alike)
    count = sum(layer.nbytes for layer in plan.layers) / max(1, nbytes)
    warming = max(0.0, spans[0] - statistics.median(spans[number] for number in alike))
    if runs[0]["bytes_read"] != nbytes:  # another kind of layer: it tells nothing of that
        warming = 0.0
    seconds: float = max(nbytes / reading, around + forward, writing) * count + warming
    return seconds


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
