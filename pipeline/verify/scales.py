"""Scales of weights and inputs."""

from __future__ import annotations

import math
from typing import Any

from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.source import Checkpoint
from pipeline.checkpoint.values import FORMATS, scalar, unusable_scales
from pipeline.formats.methods import ANY_SCALE, FP8, Method, is_weight_scale
from pipeline.model.fused import fused_groups
from pipeline.verify.kv_cache import LEAST, MOST
from pipeline.verify.report import Report


def check_scales(result: Checkpoint, method: Method, report: Report) -> str:
    """Every FP8 weight has the scales that its method asks for, each finite, positive and of the right shape."""
    counted = 0
    kinds = {"weight_scale": "a scale", **({"input_scale": "an input scale"} if method.static_inputs else {})}
    for name, tensor in result.tensors.items():
        owner, _, last = name.rpartition(".")
        if last in ("weight_scale", "input_scale"):
            weight = result.tensors.get(f"{owner}.weight")
            if weight is None or weight.dtype != FP8:
                report.problems.append(f"{name}: there is no FP8 weight that it scales")
            elif last not in kinds:
                report.problems.append(f"{name}: a static input scale, but the config says that inputs are dynamic")
            continue
        if tensor.dtype != FP8:
            continue
        counted += 1
        for kind in kinds:
            scale = result.tensors.get(f"{name.removesuffix('.weight')}.{kind}") if name.endswith(".weight") else None
            if scale is None:
                what = "run them unscaled" if kind == "weight_scale" else "quantize its inputs with an unset scale"
                report.problems.append(f"{name}: FP8 codes without {_article(kind)} {kind}: vLLM would {what}")
                continue
            expected = method.scale_shape(tensor.shape[0]) if len(tensor.shape) == 2 else None
            if scale.shape != expected and not (expected == () and scale.shape == (1,)):
                each = "one scale a row" if expected else "one scale a tensor"
                report.problems.append(f"{scale.name}: shape {list(scale.shape)}, {each} is {list(expected or ())}")
                continue
            if bad := unusable_scales(result, scale):
                report.problems.append(f"{scale.name}: {len(bad)} scale(s) are not finite and positive, first {bad[0]}")
    if not counted:
        report.problems.append("there is no FP8 weight in this checkpoint")
    if method.static_inputs:
        _note_unshared(result, report)
        _check_inputs(result, report)
    return f"{counted} FP8 weights: each has finite, positive scales of the right shape"


def check_foreign_scales(result: Checkpoint, section: dict[str, Any], report: Report) -> str:
    """What holds for any layout: codes have a scale beside them and the reverse, and scales are finite and positive."""
    scaled = {found[1] for name in result.tensors if (found := ANY_SCALE.match(name))}
    codes = {
        name.removesuffix(".weight"): tensor
        for name, tensor in result.tensors.items()
        if tensor.dtype in ("F8_E4M3", "I8") and len(tensor.shape) > 1 and not ANY_SCALE.match(name)
    }
    if bare := [tensor.name for module, tensor in codes.items() if module not in scaled]:
        report.problems.append(f"{bare[0]}: codes without a scale, {len(bare)} in all: vLLM would run them unscaled")
    if section.get("quant_method") == "fp8" and section.get("activation_scheme") == "static":
        lost = [module for module in codes if f"{module}.input_scale" not in result.tensors]
        if lost:
            report.problems.append(
                f"{lost[0]}: no input_scale, {len(lost)} in all, although the config says that inputs are static"
            )
    owners = {name.rpartition(".")[0] for name, tensor in result.tensors.items() if not ANY_SCALE.match(name)}
    block = section.get("weight_block_size")
    counted = 0
    for tensor in result.tensors.values():
        if not is_weight_scale(tensor) or tensor.dtype not in FORMATS:
            continue
        counted += 1
        module = tensor.name.rpartition(".")[0]
        if module not in owners:
            report.problems.append(f"{tensor.name}: there is no weight that it scales")
        elif block and tensor.name.endswith("_scale_inv") and module in codes and len(codes[module].shape) == 2:
            expected = tuple(-(-length // size) for length, size in zip(codes[module].shape, block, strict=True))
            if tensor.shape != expected:
                report.problems.append(
                    f"{tensor.name}: shape {list(tensor.shape)}, one scale a block is {list(expected)}"
                )
                continue
        if bad := unusable_scales(result, tensor):
            report.problems.append(f"{tensor.name}: {len(bad)} scale(s) are not finite and positive, first {bad[0]}")
    return f"{counted} scales of weights and inputs: finite and positive"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _note_unshared(result: Checkpoint, report: Report) -> None:
    """Parts of one GEMM whose weight scales differ: vLLM rounds them a second time."""
    modules = [name.removesuffix(".weight") for name, tensor in result.tensors.items() if tensor.dtype == FP8]
    apart = 0
    for group in fused_groups(modules):
        scales = [result.tensors.get(f"{module}.weight_scale") for module in group]
        values = {read_tensor(result, scale) for scale in scales if scale is not None}
        apart += len(values) > 1
    if apart:
        report.notes.append(
            f"{apart} groups that vLLM fuses (q/k/v, gate/up) have different weight scales: it dequantizes them and "
            "rounds them once more with the largest"
        )
    else:
        report.checked.append("what vLLM fuses (q/k/v, gate/up) shares one weight scale")


def _check_inputs(result: Checkpoint, report: Report) -> None:
    """Input scales: within what activations reach, and one for what has one input, of which vLLM takes the largest."""
    scales = {
        name.removesuffix(".input_scale"): scalar(result, tensor)
        for name, tensor in result.tensors.items()
        if name.endswith(".input_scale") and tensor.dtype in FORMATS and math.prod(tensor.shape) == 1
    }
    for module, value in scales.items():
        if value > 0 and not LEAST <= value <= MOST:
            report.problems.append(f"{module}.input_scale: {value:.3g} is out of the range that activations have")
    apart = [group for group in fused_groups(scales) if len({scales[module] for module in group}) > 1]
    if apart:
        report.notes.append(
            f"{apart[0][0]}.input_scale: {len(apart)} groups that vLLM fuses (q/k/v, gate/up) have different input "
            "scales, although their input is the same; vLLM takes the largest"
        )
