"""The kernel against compressed-tensors: the same bits for every BF16 value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backends import fp8


def bf16(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.uint16).view(torch.bfloat16)


def quantize(quantizer, weight: torch.Tensor) -> tuple[bytes, bytes]:
    rows, columns = weight.shape
    source = bytearray(weight.contiguous().view(torch.uint8).numpy().tobytes())
    codes, scales = bytearray(rows * columns), bytearray(rows * weight.element_size())
    quantizer(memoryview(source), memoryview(codes), memoryview(scales), rows, columns)
    return bytes(codes), bytes(scales)


def both(weight: torch.Tensor) -> None:
    assert fp8.kernel() is not None, "the kernel was not compiled: is there a C compiler?"
    kernel, library = fp8.row_quantizer("BF16"), fp8._library_quantizer("BF16")
    assert quantize(kernel, weight) == quantize(library, weight)


ALL = bf16(torch.arange(65536, dtype=torch.int32))
FINITE = ALL[ALL.isfinite()]


@pytest.mark.parametrize("part", range(8))
def test_every_value_below_many_row_maxima(part: int) -> None:
    """Row maxima over all magnitudes, among them subnormal and the largest; below each, every smaller value."""
    tops = torch.cat([torch.arange(part, 0x7F80, 8 * 31), torch.tensor([0, 1, 0x7F, 0x80, 0x3C00, 0x7F7F])])
    for top in tops.tolist():
        largest = bf16(torch.tensor([top], dtype=torch.int32))
        both(torch.where(FINITE.abs() <= largest, FINITE, largest)[None])


def test_every_scale_mantissa_with_every_value() -> None:
    """A scale's mantissa is what decides rounding: all 128 of them, at the magnitude of weights."""
    tops = bf16(torch.arange(0x3D00, 0x3D80, dtype=torch.int32))
    both(torch.stack([torch.where(FINITE.abs() <= top, FINITE, top) for top in tops]))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from([1e-39, 1e-6, 0.02, 3.0, 1e30]))
def test_random_shapes(rows: int, columns: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) * size).bfloat16()
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0.0
    both(weight * torch.where(torch.rand(rows, columns, generator=generator) < 0.5, 1.0, -1.0).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("library", [False, True])
def test_names_the_first_row_that_is_not_finite(bad: float, library: bool) -> None:
    weight = torch.ones(5, 40).bfloat16()
    weight[3, 39] = bad
    weight[4, 0] = bad
    quantizer = fp8._library_quantizer("BF16") if library else fp8.row_quantizer("BF16")
    with pytest.raises(fp8.NonFiniteWeight) as caught:
        quantize(quantizer, weight)
    assert caught.value.row == 3


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_finite_check(dtype: str, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if library:
        monkeypatch.setenv(fp8.FORCE_LIBRARY, "1")
    kind = fp8._torch_dtype(dtype)
    largest = torch.full((33,), torch.finfo(kind).max, dtype=kind)
    fp8.check_finite(memoryview(bytearray(largest.view(torch.uint8).numpy().tobytes())), dtype)
    for bad in (float("nan"), float("-inf")):
        largest[17] = bad
        with pytest.raises(fp8.NonFiniteWeight):
            fp8.check_finite(memoryview(bytearray(largest.view(torch.uint8).numpy().tobytes())), dtype)


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 32), (33, 65), (7, 200), (100, 3)])
def test_transpose(rows: int, columns: int, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if library:
        monkeypatch.setenv(fp8.FORCE_LIBRARY, "1")
    values = torch.randint(-30000, 30000, (rows, columns), dtype=torch.int16)
    target = bytearray(rows * columns * 2)
    fp8.transpose(memoryview(bytearray(values.numpy().tobytes())), memoryview(target), rows, columns, 2)
    assert bytes(target) == values.t().contiguous().numpy().tobytes()


def test_the_kernel_refuses_buffers_that_do_not_fit() -> None:
    kernel = fp8.kernel()
    with pytest.raises(ValueError, match="2 x 4 BF16 values"):
        kernel.quantize_rows(bytearray(15), bytearray(8), bytearray(4), 2, 4)
    with pytest.raises(ValueError, match="transpose"):
        kernel.transpose(bytearray(16), bytearray(14), 2, 4)
    with pytest.raises(ValueError, match="largest_magnitude"):
        kernel.largest_magnitude(bytearray(3), 2)
    with pytest.raises(ValueError, match="quantize_rows"):
        kernel.quantize_rows(bytearray(0), bytearray(0), bytearray(0), -1, 4)
