"""What the streams did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Totals:
    """What one call of `run_stream` did."""

    bytes_read: int = 0
    bytes_written: int = 0
    units: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0  # where the peak was begun anew in between; see events.reset_peak_rss


@dataclass
class Calibrated:
    """What a call of `run_layers` saw, layer by layer, and did.

    Attributes:
        layers: how many ran.
        reads: how often each weight was read.
        forwards: layer forwards.
        replayed: layers that an earlier run had finished and that only ran forwards.
        imports: seconds spent importing torch, transformers and the quantization libraries.
        notes: what went otherwise than planned, for the user.
    """

    layers: int = 0
    reads: Counter[str] = field(default_factory=Counter)
    forwards: int = 0
    replayed: int = 0
    imports: float = 0.0
    notes: list[str] = field(default_factory=list)
