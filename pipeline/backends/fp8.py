"""The cast to FP8 E4M3, shared by the backends: a compiled kernel for BF16, compressed-tensors for the rest.

Both give the same bits (tests/test_fp8.py). Buffers are plain memory, so that the data-free path needs
neither torch nor NumPy when the kernel is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pipeline.errors import PipelineError

Buffer = memoryview | bytearray

FORCE_LIBRARY = "PIPELINE_FP8_LIBRARY"  # set to any value: compute with compressed-tensors although the kernel is there


class NonFiniteWeight(PipelineError):
    """A weight holds NaN or Inf; `row` is the first row that does, or None where rows do not count."""

    def __init__(self, row: int | None) -> None:
        super().__init__("NaN or Inf")
        self.row = row


def kernel() -> Any:
    """The compiled kernel, or None where the install found no C compiler."""
    if os.environ.get(FORCE_LIBRARY):
        return None
    try:
        from pipeline.backends import _fp8
    except ImportError:
        return None
    return _fp8


def row_quantizer(dtype: str) -> Callable[[Buffer, Buffer, Buffer, int, int], None]:
    """The function that quantizes rows of `dtype`.

    Args:
        dtype: ``BF16``, ``F16`` or ``F32``.

    Returns:
        ``f(source, values, scales, rows, columns)``: reads ``rows x columns`` values, writes as many E4M3 values
        and one scale per row in `dtype`. Raises `NonFiniteWeight`.
    """
    compiled = kernel()
    if dtype == "BF16" and compiled is not None:

        def quantize(source: Buffer, values: Buffer, scales: Buffer, rows: int, columns: int) -> None:
            bad = compiled.quantize_rows(source, values, scales, rows, columns)
            if bad >= 0:
                raise NonFiniteWeight(bad)

        return quantize
    return _library_quantizer(dtype)


def _library_quantizer(dtype: str) -> Callable[[Buffer, Buffer, Buffer, int, int], None]:
    import torch
    from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
    from compressed_tensors.quantization.quant_scheme import FP8_DYNAMIC
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments, kind = FP8_DYNAMIC["weights"], _torch_dtype(dtype)

    @torch.no_grad()
    def quantize(source: Buffer, values: Buffer, scales: Buffer, rows: int, columns: int) -> None:
        weight = torch.frombuffer(source, dtype=kind).view(rows, columns)
        lowest, highest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        finite = (lowest.isfinite() & highest.isfinite()).flatten()
        if not bool(finite.all()):
            raise NonFiniteWeight(int((~finite).nonzero()[0]))
        scale, zero_point = calculate_qparams(lowest, highest, arguments)
        code = ct_quantize(weight, scale, zero_point, arguments, dtype=torch.float8_e4m3fn)
        torch.frombuffer(values, dtype=torch.uint8).copy_(code.view(torch.uint8).flatten())
        torch.frombuffer(scales, dtype=kind).copy_(scale.flatten())

    return quantize


def check_finite(data: Buffer, dtype: str) -> None:
    """Raise `NonFiniteWeight` if an array of BF16, F16 or F32 holds NaN or Inf; other dtypes pass."""
    infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}.get(dtype)
    if infinity is None or not len(data):
        return
    compiled = kernel()
    if compiled is not None:
        if compiled.largest_magnitude(data, 4 if dtype == "F32" else 2) >= infinity:
            raise NonFiniteWeight(None)
        return
    import torch

    if not bool(torch.frombuffer(data, dtype=_torch_dtype(dtype)).isfinite().all()):
        raise NonFiniteWeight(None)


def transpose(source: Buffer, target: Buffer, rows: int, columns: int, width: int) -> None:
    """Write the transpose of a ``rows x columns`` array of `width`-byte values."""
    compiled = kernel()
    if compiled is not None and width == 2:
        compiled.transpose(source, target, rows, columns)
        return
    import torch

    kind = {2: torch.int16, 4: torch.int32}[width]
    view = torch.frombuffer(source, dtype=kind).view(rows, columns)
    torch.frombuffer(target, dtype=kind).view(columns, rows).copy_(view.t())


def _torch_dtype(name: str) -> Any:
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[name]
