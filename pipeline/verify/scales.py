"""Scales of weights and inputs."""

from __future__ import annotations

import math
from typing import Any

from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.source import Checkpoint, Tensor
from pipeline.checkpoint.values import FORMATS, scalar, unusable_scales
from pipeline.formats.base import Format
from pipeline.formats.methods import ANY_SCALE, is_weight_scale
from pipeline.model.fused import fused_groups
from pipeline.verify.kv_cache import LEAST, MOST
from pipeline.verify.report import Report


def check_scales(result: Checkpoint, method: Format, report: Report) -> str:
    """Every quantized weight has the scales that its method asks for, each finite, positive and of the right shape."""
    counted = 0
    kinds = ("weight_scale", "input_scale") if method.static_inputs else ("weight_scale",)
    for name, tensor in result.tensors.items():
        owner, _, last = name.rpartition(".")
        if last in ("weight_scale", "input_scale"):
            weight = result.tensors.get(f"{owner}.weight")
            if weight is None or weight.dtype != method.weight_dtype:
                text = f"{name}: there is no {method.weight_type} weight that it scales"
                report.add("scale-without-weight", name, text)
            elif last not in kinds:
                text = f"{name}: a static input scale, but the config says that inputs are dynamic"
                report.add("input-scale-unexpected", name, text)
            continue
        if tensor.dtype != method.weight_dtype:
            continue
        counted += 1
        for kind in kinds:
            scale = result.tensors.get(f"{name.removesuffix('.weight')}.{kind}") if name.endswith(".weight") else None
            if scale is None:
                if kind == "weight_scale":
                    text = f"{name}: {method.weight_type} values without a weight_scale: vLLM would run them unscaled"
                    report.add("weight-without-scale", name, text)
                else:
                    what = f"{name}: {method.weight_type} values without an input_scale"
                    text = f"{what}: vLLM would quantize its inputs with an unset scale"
                    report.add("input-scale-missing", name, text)
                continue
            expected = method.scale_shape(tensor.shape[0]) if len(tensor.shape) == 2 else None
            if scale.shape != expected and not (expected == () and scale.shape == (1,)):
                each = "one scale per row" if expected else "one scale per tensor"
                text = f"{scale.name}: shape {list(scale.shape)}, {each} is {list(expected or ())}"
                report.add("scale-shape-wrong", scale.name, text)
                continue
            _check_usable(result, scale, report)
    if not counted:
        report.add("no-fp8-weight", "", f"there is no {method.weight_type} weight in this checkpoint")
    if method.static_inputs:
        _check_fused_weight_scales(result, method, report)
        _check_input_scales(result, report)
    return f"{counted} {method.weight_type} weights: each has finite, positive scales of the right shape"


def _check_usable(result: Checkpoint, scale: Tensor, report: Report) -> None:
    """Every value of a scale is finite and positive."""
    if bad := unusable_scales(result, scale):
        text = f"{scale.name}: {len(bad)} scale(s) are not finite and positive, first {bad[0]}"
        report.add("scale-not-finite", scale.name, text)


def check_scales_of_any_layout(result: Checkpoint, section: dict[str, Any], report: Report) -> str:
    """What holds for any layout: codes have a scale beside them and the reverse, and scales are finite and positive."""
    scaled = {found[1] for name in result.tensors if (found := ANY_SCALE.match(name))}
    codes = {
        name.removesuffix(".weight"): tensor
        for name, tensor in result.tensors.items()
        if tensor.dtype in ("F8_E4M3", "I8") and len(tensor.shape) > 1 and not ANY_SCALE.match(name)
    }
    if bare := [tensor.name for module, tensor in codes.items() if module not in scaled]:
        text = f"{bare[0]}: codes without a scale, {len(bare)} in all: vLLM would run them unscaled"
        report.add("weight-without-scale", bare[0], text)
    if section.get("quant_method") == "fp8" and section.get("activation_scheme") == "static":
        lost = [module for module in codes if f"{module}.input_scale" not in result.tensors]
        if lost:
            text = f"{lost[0]}: no input_scale, {len(lost)} in all, although the config says that inputs are static"
            report.add("input-scale-missing", lost[0], text)
    owners = {name.rpartition(".")[0] for name, tensor in result.tensors.items() if not ANY_SCALE.match(name)}
    block = section.get("weight_block_size")
    counted = 0
    for tensor in result.tensors.values():
        if not is_weight_scale(tensor) or tensor.dtype not in FORMATS:
            continue
        counted += 1
        module = tensor.name.rpartition(".")[0]
        if module not in owners:
            report.add("scale-without-weight", tensor.name, f"{tensor.name}: there is no weight that it scales")
        elif block and tensor.name.endswith("_scale_inv") and module in codes and len(codes[module].shape) == 2:
            expected = tuple(-(-length // size) for length, size in zip(codes[module].shape, block, strict=True))
            if tensor.shape != expected:
                text = f"{tensor.name}: shape {list(tensor.shape)}, one scale per block is {list(expected)}"
                report.add("scale-shape-wrong", tensor.name, text)
                continue
        _check_usable(result, tensor, report)
    return f"{counted} scales of weights and inputs: finite and positive"


def _check_fused_weight_scales(result: Checkpoint, method: Format, report: Report) -> None:
    """Fused modules share one weight scale; where they do not, vLLM rounds them a second time."""
    modules = [name.removesuffix(".weight") for name, t in result.tensors.items() if t.dtype == method.weight_dtype]
    apart = []
    for group in fused_groups(modules):
        scales = [result.tensors.get(f"{module}.weight_scale") for module in group]
        if len({read_tensor(result, scale) for scale in scales if scale is not None}) > 1:
            apart.append(group[0])
    if apart:
        report.add(
            "fused-weight-scales-differ",
            f"{apart[0]}.weight_scale",
            f"{len(apart)} groups that vLLM fuses (q/k/v, gate/up) have different weight scales: it dequantizes them "
            "and rounds them once more with the largest",
        )
    else:
        report.checked.append("what vLLM fuses (q/k/v, gate/up) shares one weight scale")


def _check_input_scales(result: Checkpoint, report: Report) -> None:
    """Input scales: within what activations reach, and one for what has one input, of which vLLM takes the largest."""
    scales = {
        name.removesuffix(".input_scale"): scalar(result, tensor)
        for name, tensor in result.tensors.items()
        if name.endswith(".input_scale") and tensor.dtype in FORMATS and math.prod(tensor.shape) == 1
    }
    for module, value in scales.items():
        if value > 0 and not LEAST <= value <= MOST:
            text = f"{module}.input_scale: {value:.3g} is out of the range that activations have"
            report.add("input-scale-out-of-range", f"{module}.input_scale", text)
    apart = [group for group in fused_groups(scales) if len({scales[module] for module in group}) > 1]
    if apart:
        report.add(
            "fused-input-scales-differ",
            f"{apart[0][0]}.input_scale",
            f"{apart[0][0]}.input_scale: {len(apart)} groups that vLLM fuses (q/k/v, gate/up) have different input "
            "scales, although their input is the same; vLLM takes the largest",
        )
