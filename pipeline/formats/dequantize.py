"""FP8 and INT8 weights as the numbers that they stand for: values times scale, of whatever granularity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_BLOCK = (128, 128)


def dequantize(values: Any, scale: Any, block: tuple[int, int] = DEFAULT_BLOCK, zero_point: Any = None) -> Any | None:
    """A weight in F32.

    Args:
        values: [rows, columns] in a dtype of FP8, in integers, or as numbers.
        scale: one number, one per row ([rows] or [rows, 1]), one per block ([rows / high, columns / wide], rounded
            up) or per group of a row ([rows, columns / group]), of any floating-point dtype.
        block: rows and columns that share a scale, where `scale` has several columns.
        zero_point: of the shape of `scale`; None: symmetric.

    Returns:
        [rows, columns] in F32; None where the scale's shape fits none of these.
    """
    factor = _spread(scale.float(), values.shape, block)
    zero = None if zero_point is None else _spread(zero_point.float(), values.shape, block)
    if factor is None or (zero_point is not None and zero is None):
        return None
    return (values.float() if zero is None else values.float() - zero) * factor


def _spread(scale: Any, shape: tuple[int, int], block: tuple[int, int]) -> Any | None:
    """A scale in a form that multiplies [rows, columns]; None where its shape does not fit."""
    rows, columns = shape
    if scale.dim() == 2 and scale.shape[1] > 1:
        high, wide = block
        if scale.shape[0] == rows and columns % scale.shape[1] == 0:  # groups within a row
            high, wide = 1, columns // scale.shape[1]
        spread = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        return spread if spread.shape == (rows, columns) else None
    return scale.reshape(-1, 1) if scale.numel() in (1, rows) else None


def unpack_words(words: Any, bits: int, columns: int) -> Any:
    """Integers from 32-bit words, as compressed-tensors packs them: the first in the lowest bits, none below zero.

    Args:
        words: [rows, words] in torch.int32.
        bits: 4 or 8.
        columns: of the weight.

    Returns:
        [rows, columns], from -2^(bits - 1).
    """
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.reshape(words.shape[0], -1)[:, :columns] - (1 << (bits - 1))


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, by its lower three bits; the fourth is the sign


def unpack_fp4(pairs: Any) -> Any:
    """E2M1 values as F32 from bytes of two, the first in the lower half: [rows, bytes] gives [rows, 2 * bytes]."""
    import torch

    halves = torch.stack((pairs & 0xF, pairs >> 4), -1).reshape(pairs.shape[0], -1).long()
    return torch.tensor([*FP4, *(-value for value in FP4)])[halves]


def block_of(section: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale: `weight_block_size` of ``fp8``, `block_structure` of compressed-tensors.

    Raises:
        ValueError: the section says what is no block.
    """
    groups = section.get("config_groups") or {}
    said = [
        section.get("weight_block_size"),
        *((g.get("weights") or {}).get("block_structure") for g in groups.values()),
    ]
    high, wide = next((size for size in said if size), DEFAULT_BLOCK)
    if not all(isinstance(size, int) and 0 < size < 1 << 31 for size in (high, wide)):
        raise ValueError(f"blocks of {high}x{wide}")
    return int(high), int(wide)
