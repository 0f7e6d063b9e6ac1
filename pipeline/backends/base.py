"""What a backend is: answers about a scheme, never a file and never a loop over layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.backends.fp8 import Buffer
from pipeline.model.selection import Selection


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a quantized module becomes: what follows the module's name, dtype, and shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


class Backend(Protocol):
    """A quantization scheme whose weights need no data. Calibrated schemes will add how ranges are collected."""

    name: str
    scheme: str

    def outputs(self, dtype: str, rows: int, columns: int) -> tuple[Output, Output]:
        """The codes and the scales of a ``rows x columns`` weight of `dtype`."""

    def quantizer(self, dtype: str) -> Callable[[Buffer, Buffer, Buffer, int, int], None]:
        """``f(source, codes, scales, rows, columns)``, safe to call from several threads at once."""

    def config_section(self, selection: Selection) -> dict[str, Any]:
        """The ``quantization_config`` of the result's config.json."""

    def versions(self, dtypes: set[str]) -> dict[str, str]:
        """The libraries that decide the bits of weights of these dtypes, for a run's identity."""
