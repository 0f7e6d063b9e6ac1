"""FP8 weights as the numbers that they stand for: values times scale, per-tensor, per-channel or block-wise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT_BLOCK = (128, 128)


def dequantize(values: Any, scale: Any, block: tuple[int, int] = DEFAULT_BLOCK) -> Any | None:
    """A weight in F32.

    Args:
        values: [rows, columns] in torch.float8_e4m3fn.
        scale: one number, one per row ([rows] or [rows, 1]), or one per block ([rows / high, columns / wide], rounded
            up), of any floating-point dtype.
        block: rows and columns that share a scale, where `scale` has several columns.

    Returns:
        [rows, columns] in F32; None where the scale's shape fits none of these.
    """
    rows, columns = values.shape
    factor = scale.float()
    if factor.dim() == 2 and factor.shape[1] > 1:
        high, wide = block
        factor = factor.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        if factor.shape != (rows, columns):
            return None
    elif factor.numel() in (1, rows):
        factor = factor.reshape(-1, 1)
    else:
        return None
    return values.float() * factor


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
