"""One append-only record of a run, quantize/events.jsonl; progress, timings and traces are views of it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

STAGES = ("read", "load", "forward", "quantize", "write")
ARGUMENTS = ("tensor", "bytes_read", "bytes_written", "tokens", "tokens_per_s", "replayed")  # shown in a trace


class EventLog:
    """Appends events as JSON lines, each with seconds since the epoch; safe from several threads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        line = json.dumps({"time": round(time.time(), 6), "event": event, **fields}, separators=(",", ":"))
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Make the record durable."""
        os.fsync(self._file.fileno())
        self._file.close()


def _end_last_line(path: Path) -> None:
    """A kill may have torn the last line; what follows must not be glued to it."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a record, without lines that a kill tore."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def layer_timings(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per layer, over all runs of a record: seconds in each stage, bytes read and written, memory; slowest first.

    Layers of a calibrated run also say tokens a second, of the last pass, and the GPU's peak.
    """
    layers: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("event") not in ("piece", "layer"):
            continue
        row = layers.setdefault(
            event["label"],
            {"layer": event["label"], **{f"{stage}_s": 0.0 for stage in STAGES}, "bytes_read": 0,
             "bytes_written": 0, "rss_bytes": 0},
        )  # fmt: skip
        for stage in STAGES:
            begin, end = event.get(stage, (0.0, 0.0))
            row[f"{stage}_s"] += end - begin
        row["bytes_read"] += event["bytes_read"]
        row["bytes_written"] += event["bytes_written"]
        row["rss_bytes"] = max(row["rss_bytes"], event["rss_bytes"])
        if event["event"] == "layer":
            row["tokens_per_s"] = event["tokens_per_s"]
            row["device_bytes"] = max(row.get("device_bytes", 0), event["device_bytes"])
    for row in layers.values():
        for stage in STAGES:
            row[f"{stage}_s"] = round(row[f"{stage}_s"], 6)
    return sorted(layers.values(), key=lambda row: -sum(row[f"{stage}_s"] for stage in STAGES))


def chrome_trace(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The record in Chrome's trace event format, which Perfetto (ui.perfetto.dev) opens.

    Complete events ("ph": "X") with microseconds; a row per stage and thread. Format: "Trace Event Format",
    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    rows: dict[tuple[str, str], int] = {}
    trace: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") in ("piece", "layer"):
            for stage in STAGES:
                if stage not in event:
                    continue
                begin, end = event[stage]
                thread = event.get("thread", "") if stage == "quantize" else ""
                row = rows.setdefault((stage, thread), len(rows) + 1)
                trace.append({
                    "name": event["label"], "cat": stage, "ph": "X", "pid": 1, "tid": row,
                    "ts": round(begin * 1e6), "dur": max(1, round((end - begin) * 1e6)),
                    "args": {key: event[key] for key in ARGUMENTS if key in event},
                })  # fmt: skip
            at = round(event.get("write", event.get("forward", event["read"]))[1] * 1e6)
            counters = {"RSS": event["rss_bytes"], "device": event.get("device_bytes", 0)}
            trace += [
                {"name": name, "ph": "C", "pid": 1, "ts": at, "args": {"MB": value / 1e6}}
                for name, value in counters.items()
                if value
            ]
        elif event.get("event") == "unit":
            row = rows.setdefault(("flush", ""), len(rows) + 1)
            begin, end = event["flush"]
            trace.append({"name": f"unit {event['unit']}", "cat": "flush", "ph": "X", "pid": 1, "tid": row,
                          "ts": round(begin * 1e6), "dur": max(1, round((end - begin) * 1e6))})  # fmt: skip
    names = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": f"{stage} {thread}".strip()}}
        for (stage, thread), row in rows.items()
    ]
    return {"traceEvents": names + trace, "displayTimeUnit": "ms"}


def recorded_layers(path: Path) -> list[dict[str, Any]]:
    """`layer_timings` of the record at `path`; empty where there is none."""
    return layer_timings(read_events(path)) if path.exists() else []
