"""What a stream did, and what it took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Totals:
    """What one call of `run_stream` or `run_layers` did; the sum of two is what both did.

    Attributes:
        bytes_read: of the source's shards.
        bytes_written: of the result's shards.
        units: of the journal that were finished.
        seconds: from the stream's start to its end.
        peak_rss_bytes: of this process, where the peak was begun anew in between; see `memory.reset_peak_rss`.
        layers: decoder layers that ran.
        forwards: how often a batch ran through a layer.
        replayed: layers that an earlier run had finished and that only ran forwards.
        imports: seconds spent importing torch, transformers and the quantization libraries.
        reads: by name, how often each tensor of a layer was read.
        notes: what went otherwise than planned, for the user.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    units: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    layers: int = 0
    forwards: int = 0
    replayed: int = 0
    imports: float = 0.0
    reads: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def __add__(self, other: Totals) -> Totals:
        """What both did, one after the other."""
        return Totals(
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            units=self.units + other.units,
            seconds=self.seconds + other.seconds,
            peak_rss_bytes=max(self.peak_rss_bytes, other.peak_rss_bytes),
            layers=self.layers + other.layers,
            forwards=self.forwards + other.forwards,
            replayed=self.replayed + other.replayed,
            imports=self.imports + other.imports,
            reads=self.reads + other.reads,
            notes=[*self.notes, *other.notes],
        )

    def as_event(self) -> dict[str, Any]:
        """The fields of the event ``streamed`` in quantize/events.jsonl."""
        return {
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "units": self.units,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }
