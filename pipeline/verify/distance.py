"""How far a quantized weight, as the number that it stands for, is from its source's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.source import DTYPES, FLOAT_DTYPES, Checkpoint, Tensor
from pipeline.formats.dequantize import block_of, dequantize, unpack_fp4, unpack_words
from pipeline.formats.methods import quantization_section

VALUES = ("F8_E4M3", "F8_E5M2", "I8")  # one in a byte
SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0")
INT8_AMAX = "SCB"  # of bitsandbytes: the largest magnitude of each row, which 127 stands for
PACKED_SUFFIXES = ("weight_packed", "qweight")
OF_A_MODULE = (  # what a quantized module's tensors are called, whoever made it
    "weight", "weight_packed", "weight_shape", "weight_scale", "weight_scale_inv", "weight_scale_2",
    "weight_zero_point", "weight_global_scale", "input_scale", "input_global_scale", "SCB",
)  # fmt: skip
COST = {8: "8 bits cost about 3%", 4: "4 bits cost about 12%"}  # of a weight's norm
FAR = {8: 0.1, 4: 0.5}  # a scale that is twice too large costs 1; what compensates for 4 bits moves weights itself


@dataclass(frozen=True)
class Distance:
    """The norm of the difference over the source's norm, and the bits of a value; infinity: it holds no numbers."""

    share: float
    bits: int

    @property
    def far(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.share <= FAR[self.bits]

    @property
    def cost(self) -> str:
        """What rounding explains, in words."""
        return COST[self.bits]


def packed_names(name: str) -> tuple[str, ...]:
    """Names under which other layouts keep the values of a source's weight, several in a word."""
    module = name.removesuffix(".weight")
    return tuple(f"{module}.{suffix}" for suffix in PACKED_SUFFIXES)


def distance_from(source: Checkpoint, tensor: Tensor, result: Checkpoint) -> Distance | None:
    """How far what a checkpoint holds for a weight is from its source's.

    Any weight of two or more dimensions: a convolution's rows are its output channels, and fused experts,
    [experts, ...], have a scale each. FP8 and INT8 in bytes, INT4 and INT8 as compressed-tensors packs them into words,
    and NVFP4 and MXFP4 by the names of compressed-tensors and ModelOpt.

    Args:
        source: the original.
        tensor: its weight, in BF16, F16 or F32.
        result: has the quantized one.

    Returns:
        None where that is in none of these layouts, or its scale is not one per tensor, row, group or block.
    """
    if len(tensor.shape) < 2:
        return None
    held = _in_bytes(result, tensor) or _packed(result, tensor)
    if held is None:
        return None
    weight = _load(source, tensor)
    block = block_of(quantization_section(result) or {})
    fused = len(tensor.shape) == 3 and held.scale.dim() == 3
    apart = length = 0.0
    for part in range(tensor.shape[0]) if fused else (...,):
        before = weight[part].reshape(weight[part].shape[0], -1).float()
        zeros = None if held.zero_point is None else _flat(held.zero_point[part])
        found = dequantize(held.values[part].reshape(before.shape), _flat(held.scale[part]), block, zeros)
        if found is None:
            return None
        apart += float((found - before).square().sum())
        length += float(before.square().sum())
    if math.isnan(apart):
        return Distance(math.inf, held.bits)
    return Distance((apart / length) ** 0.5 if length else 0.0, held.bits)


@dataclass(frozen=True)
class _Held:
    """Values of the source's shape, and the scale that multiplies them."""

    values: Any
    scale: Any
    zero_point: Any
    bits: int


def _in_bytes(result: Checkpoint, tensor: Tensor) -> _Held | None:
    """One value in a byte, under the source's own name."""
    name, values = tensor.name, result.tensors.get(tensor.name)
    if values is None or values.dtype not in VALUES or values.shape != tensor.shape:
        return None
    scale = _first(result, f"{name}_scale", f"{name}_scale_inv")
    if scale is not None:
        factor = _load(result, scale).float() if scale.dtype in SCALE_DTYPES else None
    else:
        largest = result.tensors.get(f"{name.removesuffix('.weight')}.{INT8_AMAX}")
        factor = None if largest is None else _load(result, largest).float() / 127
    if factor is None:
        return None
    zero = result.tensors.get(f"{name}_zero_point")
    return _Held(_load(result, values), factor, None if zero is None else _load(result, zero), 8)


def _packed(result: Checkpoint, tensor: Tensor) -> _Held | None:
    """Several values in a word or a byte, symmetric, in the order of the columns."""
    name, (rows, columns) = tensor.name, (tensor.shape[0], math.prod(tensor.shape[1:]))
    values, scale = _first(result, f"{name}_packed", name), result.tensors.get(f"{name}_scale")
    if values is None or scale is None or len(tensor.shape) != 2 or len(values.shape) != 2 or values.shape[0] != rows:
        return None
    if f"{name}_zero_point" in result.tensors or f"{name}_g_idx" in result.tensors:
        return None
    if values.dtype == "I32" and scale.dtype in FLOAT_DTYPES:
        bits = next((bits for bits in (4, 8) if values.shape[1] == -(-columns * bits // 32)), None)
        if bits is None:
            return None
        return _Held(unpack_words(_load(result, values), bits, columns), _load(result, scale).float(), None, bits)
    if values.dtype != "U8" or 2 * values.shape[1] != columns:
        return None
    if scale.dtype == "F8_E4M3":  # NVFP4: compressed-tensors divides by the second scale, ModelOpt multiplies
        divisor, factor = result.tensors.get(f"{name}_global_scale"), result.tensors.get(f"{name}_scale_2")
        if divisor is not None:
            found = _load(result, scale).float() / _load(result, divisor).float()
        elif factor is not None:
            found = _load(result, scale).float() * _load(result, factor).float()
        else:
            return None
    elif scale.dtype in ("U8", "F8_E8M0"):  # MXFP4: exponents
        raw = bytes(read_tensor(result, scale))
        found = _exponents(raw).view(scale.shape)
    else:
        return None
    return _Held(unpack_fp4(_load(result, values)), found, None, 4)


def _exponents(raw: bytes) -> Any:
    """E8M0: powers of two, biased by 127 (OCP Microscaling Formats, section 5.4.1)."""
    import torch

    return torch.exp2(torch.frombuffer(bytearray(raw), dtype=torch.uint8).float() - 127)


def _first(result: Checkpoint, *names: str) -> Tensor | None:
    return next((result.tensors[name] for name in names if name in result.tensors), None)


def _flat(scale: Any) -> Any:
    """A convolution's scales, [rows, 1, 1, 1], as those of a matrix."""
    return scale.reshape(scale.shape[0], -1) if scale.dim() > 2 else scale


def _load(checkpoint: Checkpoint, tensor: Tensor) -> Any:
    """A tensor on the CPU, in its own dtype."""
    import torch

    kind = getattr(torch, DTYPES[tensor.dtype][1])
    return torch.frombuffer(bytearray(read_tensor(checkpoint, tensor)), dtype=kind).view(tensor.shape)
