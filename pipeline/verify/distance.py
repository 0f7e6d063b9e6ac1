"""How far a quantized weight, as the number that it stands for, is from its source's."""

from __future__ import annotations

import math
from typing import Any

from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.source import DTYPES, FLOAT_DTYPES, Checkpoint, Tensor
from pipeline.formats.dequantize import block_of, dequantize
from pipeline.formats.methods import quantization_section

VALUES = ("F8_E4M3", "F8_E5M2", "I8")
SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0")
SCALES = ("_scale", "_scale_inv")  # after a weight's own name
INT8_AMAX = "SCB"  # of bitsandbytes: the largest magnitude of each row, which 127 stands for
PACKED_SUFFIXES = ("weight_packed", "qweight")


def packed_names(name: str) -> tuple[str, ...]:
    """Names under which other layouts keep the values of a source's weight, several in a word."""
    module = name.removesuffix(".weight")
    return tuple(f"{module}.{suffix}" for suffix in PACKED_SUFFIXES)


def distance_from(source: Checkpoint, tensor: Tensor, result: Checkpoint) -> float | None:
    """The norm of the difference between a weight, dequantized, and its source's, over the source's norm.

    Any weight of two or more dimensions: a convolution's rows are its output channels, and fused experts,
    [experts, ...], have a scale each.

    Args:
        source: the original.
        tensor: its weight, in BF16, F16 or F32.
        result: has the quantized one under the same name.

    Returns:
        None where there are no FP8 or INT8 values with a scale per tensor, row, group or block; infinity where a
        difference is no number.
    """
    values = result.tensors.get(tensor.name)
    if values is None or values.dtype not in VALUES or values.shape != tensor.shape or len(tensor.shape) < 2:
        return None
    scale = _scale(result, tensor.name)
    if scale is None:
        return None
    zero = result.tensors.get(f"{tensor.name}_zero_point")
    held, weight = _load(result, values), _load(source, tensor)
    zero_point = _load(result, zero) if zero is not None else None
    block = block_of(quantization_section(result) or {})
    fused = len(tensor.shape) == 3 and scale.dim() == 3
    apart = length = 0.0
    for part in range(tensor.shape[0]) if fused else (...,):
        before = weight[part].reshape(weight[part].shape[0], -1).float()
        zeros = None if zero_point is None else _flat(zero_point[part])
        found = dequantize(held[part].reshape(before.shape), _flat(scale[part]), block, zeros)
        if found is None:
            return None
        apart += float((found - before).square().sum())
        length += float(before.square().sum())
    if math.isnan(apart):
        return math.inf
    return (apart / length) ** 0.5 if length else 0.0


def _flat(scale: Any) -> Any:
    """A convolution's scales, [rows, 1, 1, 1], as those of a matrix."""
    return scale.reshape(scale.shape[0], -1) if scale.dim() > 2 else scale


def _scale(result: Checkpoint, name: str) -> Any | None:
    """The scale of a weight, or None: what divides its values, in the form that multiplies them."""
    for suffix in SCALES:
        found = result.tensors.get(name + suffix)
        if found is not None:
            return _load(result, found).float() if found.dtype in SCALE_DTYPES else None
    largest = result.tensors.get(f"{name.removesuffix('.weight')}.{INT8_AMAX}")
    return _load(result, largest).float() / 127 if largest is not None and largest.dtype in FLOAT_DTYPES else None


def _load(checkpoint: Checkpoint, tensor: Tensor) -> Any:
    """A tensor on the CPU, in its own dtype."""
    import torch

    kind = getattr(torch, DTYPES[tensor.dtype][1])
    return torch.frombuffer(bytearray(read_tensor(checkpoint, tensor)), dtype=kind).view(tensor.shape)
