"""How far a job is, read from its events.jsonl while it is written."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

EVENTS = "quantize/events.jsonl"
EARLY = 0.02  # the share of the work before which the rate says little


@dataclass
class Progress:
    """How far a job is at one moment.

    Attributes:
        stage: starting, streaming, layers, verifying or publishing.
        at: the layer or part that it works on.
        share: the share of the source's bytes that has been processed, 0 to 1.
        rate: source bytes per second, in this process.
        left: seconds left at this rate; None: it is too early to say.
        device_bytes: the most GPU memory so far.
        rss: the most host memory so far, in bytes.
    """

    stage: str = "starting"
    at: str = ""
    share: float = 0.0
    rate: float = 0.0
    left: float | None = None
    device_bytes: int = 0
    rss: int = 0


@dataclass
class Follower:
    """Reads what is new in a job's events.jsonl; cheap enough for every second.

    Attributes:
        output: where the result will be.
        total: source bytes that a whole run reads.
        since: seconds since the epoch; earlier events belong to earlier attempts.
    """

    output: Path
    total: int
    since: float
    _offset: int = 0
    _layers: dict[int, int] = field(default_factory=dict)
    _pieces: int = 0
    _before: int | None = None
    _begun: float = 0.0
    _latest: Progress = field(default_factory=Progress)  # without share, rate and time left

    def now(self) -> Progress:
        """How far the job is by now."""
        for event in self._read():
            self._take(event)
        done = min(self._pieces + sum(self._layers.values()), self.total)
        share = done / self.total if self.total else 0.0
        new = done - (self._before or 0)
        seconds = max(time.time() - self._begun, 1e-3)
        rate = new / seconds if self._begun and new > 0 else 0.0
        left = (self.total - done) / rate if rate and new > EARLY * self.total else None
        return replace(self._latest, share=share, rate=rate, left=left)

    def _read(self) -> list[dict[str, Any]]:
        found = []
        try:
            path = Path(f"{self.output}.partial") / EVENTS
            if not path.exists():
                path = self.output / EVENTS
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # it was started over
                    self._offset, self._layers, self._pieces, self._before = 0, {}, 0, None
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def _take(self, event: dict[str, Any]) -> None:
        latest, kind = self._latest, event.get("event")
        current = event.get("time", 0.0) >= self.since
        if kind in ("piece", "layer"):
            latest.at, latest.rss = event["label"], max(latest.rss, event["rss_bytes"])
        match kind:
            case "run" if current:
                latest.stage, self._begun = "streaming", event["time"]
                self._before = self._pieces + sum(self._layers.values())
            case "piece":
                self._pieces += event["bytes_read"]
            case "imports" if current:
                latest.stage = "layers"
            case "layer":
                self._layers[event["index"]] = event["bytes_read"]
                latest.device_bytes = max(latest.device_bytes, event.get("device_bytes", 0))
            case "sealed" if current:
                latest.stage, latest.at = "verifying", ""
            case "verified" if current:
                latest.stage = "publishing"
