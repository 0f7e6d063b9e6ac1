"""Values of small tensors, read without torch."""

from __future__ import annotations

import struct
from array import array

from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.source import Checkpoint, Tensor

FORMATS = {"BF16": ("H", 0x7F80), "F16": ("H", 0x7C00), "F32": ("I", 0x7F800000)}  # array code, bits of infinity


def unusable_scales(checkpoint: Checkpoint, tensor: Tensor) -> list[float]:
    """The values that are not finite and positive. As integers, finite positive ones are the patterns from 1 to Inf's.

    Raises:
        ValueError: no dtype that a scale has.
    """
    if tensor.dtype not in FORMATS:
        raise ValueError(f"{tensor.name} is {tensor.dtype}; scales are BF16, F16 or F32")
    code, infinity = FORMATS[tensor.dtype]
    bits = array(code, read_tensor(checkpoint, tensor))
    if bits and min(bits) > 0 and max(bits) < infinity:
        return []
    return [_as_float(value, tensor.dtype) for value in bits if not 0 < value < infinity]


def _as_float(bits: int, dtype: str) -> float:
    if dtype == "F16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16 if dtype == "BF16" else bits))[0])


def scalar(checkpoint: Checkpoint, tensor: Tensor) -> float:
    """The value of a scalar tensor in BF16, F16 or F32."""
    raw = read_tensor(checkpoint, tensor)
    return _as_float(int.from_bytes(raw, "little"), tensor.dtype)
