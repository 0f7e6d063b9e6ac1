"""KV-cache scales: present, usable, and those that the run measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.result import CALIBRATION
from pipeline.checkpoint.source import Checkpoint, Tensor, read_json
from pipeline.checkpoint.values import FORMATS, scalar, unusable_scales
from pipeline.formats.base import Format
from pipeline.formats.kv_scales import E4M3_MAX
from pipeline.formats.methods import (
    CACHE_NAMES,
    CACHE_SCALE,
    OTHER_NAMES,
    SECTION,
    has_cache_scales,
    promised_cache,
    without_scale,
)
from pipeline.model.selection import Selection, attention_prefix
from pipeline.verify.report import Finding, Report

SCHEME = f"{SECTION}.kv_cache_scheme"
LEAST, MOST = 2.0**-40, 2.0**20  # of a KV or input scale: ranges from 4e-10 to 5e8


def check_cache(
    result: Checkpoint,
    selection: Selection,
    section: dict[str, Any],
    method: Format | None,
    report: Report,
) -> str | None:
    """Every attention layer has the scales that the config promises, and each is one that vLLM can use."""
    attentions = {
        prefix
        for name, choice in selection.choices.items()
        if choice.layer is not None
        and (prefix := attention_prefix([name], f"{choice.component}.{choice.layer}" if choice.component else ""))
    }
    names = dict(method.cache if method is not None and method.cache else CACHE_NAMES)
    if not report.produced_here:
        names = {key: (*each, *OTHER_NAMES.get(key, ())) for key, each in names.items()}
    known = {f"{attention}.{name}" for attention in attentions for each in names.values() for name in each}
    for name in result.tensors:
        if method is not None and CACHE_SCALE.search(name) and name not in known:
            report.add("kv-scale-name-unknown", name, f"{name}: vLLM loads no KV-cache scale of this name here")
    found = {
        (attention, key): result.tensors[f"{attention}.{name}"]
        for attention in attentions
        for key, each in names.items()
        for name in each
        if f"{attention}.{name}" in result.tensors
    }
    scheme, promised = section.get("kv_cache_scheme"), promised_cache(result)
    values = _usable_values(result, found, report)
    if promised is None:
        if scheme:
            report.add("kv-scheme-unread", SCHEME, f"{SCHEME}: {scheme!r} is no FP8 scheme")
        if has_cache_scales(result):
            report.add(
                "kv-scales-unused",
                SCHEME,
                f"{sum(1 for name in result.tensors if CACHE_SCALE.search(name))} KV-cache scales, but the config has "
                "no kv_cache_scheme that vLLM reads: it uses them only with --kv-cache-dtype fp8",
            )
        return None
    if promised != "fp8":
        text = f"the config promises a KV cache in {promised}, which is not judged here"
        report.add("kv-cache-dtype-not-judged", SCHEME, text)
        return None
    if isinstance(scheme, dict):
        if not (scheme.get("num_bits") == 8 and scheme.get("type") == "float"):
            report.add("kv-scheme-not-fp8", SCHEME, f"{SCHEME}: {scheme!r} is no FP8 scheme")
        if str(scheme.get("observer")).startswith("memoryless"):
            report.add(
                "kv-observer-memoryless",
                f"{SCHEME}.observer",
                f"{SCHEME}.observer is {scheme['observer']}: it keeps the last batch's range alone, "
                "so keys and values of others may be clipped",
            )
    _check_all_present(attentions, found, section, report)
    ones = [a for a in sorted(attentions) if values.get((a, "k")) == 1.0 and values.get((a, "v")) == 1.0]
    if ones:
        text = f"{ones[0]}: k_scale and v_scale are both 1.0, in {len(ones)} layer(s), as in an uncalibrated cache"
        covers = tuple(found[attention, key].name for attention in ones for key in "kv")
        report.take(Finding("kv-scale-one", ones[0], text, covers=covers))
    if report.produced_here:
        _check_against_calibration(result, values, found, report)
    _check_dtypes(result, found, report)
    _check_names(attentions, found, names, report)
    kinds = ", ".join(key for key in names if all((a, key) in found for a in attentions))
    return f"{len(attentions)} attention layers: finite, positive KV-cache scales ({kinds or 'none'})"


def _usable_values(
    result: Checkpoint, found: dict[tuple[str, str], Tensor], report: Report
) -> dict[tuple[str, str], float]:
    """The cache scales that are single numbers, by attention and key; what vLLM could not use is a problem."""
    values: dict[tuple[str, str], float] = {}
    for (attention, key), tensor in found.items():
        heads = len(tensor.shape) == 3 and tensor.shape[1:] == (1, 1)
        if tensor.shape not in ((), (1,)) and not heads:
            text = f"{tensor.name}: shape {list(tensor.shape)}; one scale a layer is a single value"
            report.add("kv-scale-shape-wrong", tensor.name, text)
            continue
        if tensor.dtype not in FORMATS:
            text = f"{tensor.name}: it is {tensor.dtype}; scales are BF16, F16 or F32"
            report.add("kv-scale-dtype-wrong", tensor.name, text)
            continue
        if bad := unusable_scales(result, tensor):
            report.add("kv-scale-not-finite", tensor.name, f"{tensor.name}: {bad[0]} is not finite and positive")
            continue
        if not heads:
            value = values[attention, key] = scalar(result, tensor)
            if not LEAST <= value <= MOST:
                text = f"{tensor.name}: {value:.3g} is out of the range that keys and values have"
                report.add("kv-scale-out-of-range", tensor.name, text)
    return values


def _check_all_present(
    attentions: set[str], found: dict[tuple[str, str], Tensor], section: dict[str, Any], report: Report
) -> None:
    """Every attention has k_scale and v_scale. Without them vLLM 0.32 does what its quantization methods' code says."""
    lost: dict[tuple[str, ...], list[str]] = {}
    for attention in sorted(attentions):
        if gone := tuple(key for key in "kv" if (attention, key) not in found):
            lost.setdefault(gone, []).append(attention)
    for gone, where in lost.items():
        report.add(
            "kv-scale-missing",
            where[0],
            f"{where[0]}: no {' and '.join(f'{key}_scale' for key in gone)}, in {len(where)} of {len(attentions)} "
            f"layers, although the config promises an FP8 KV cache: vLLM would {without_scale(section, gone)}",
        )


def _check_against_calibration(
    result: Checkpoint, values: dict[tuple[str, str], float], found: dict[tuple[str, str], Tensor], report: Report
) -> None:
    """Scales that this tool wrote are those of the amax that its run measured, in quantize/calibration.json."""
    path = result.root / CALIBRATION
    if not path.exists():
        return
    layers = read_json(path).get("layers", [])
    measured = {layer["layer"]: layer.get("attention") or {} for layer in layers}
    for attention in sorted({attention for attention, _ in values}):
        amax = measured.get(attention.rpartition(".")[0], {})
        fits = {
            (key, other)
            for key in "kvq"
            for other in "kvq"
            if (attention, key) in values and other in amax and _is_scale_of(values[attention, key], float(amax[other]))
        }
        if {("k", "v"), ("v", "k")} <= fits and not {("k", "k"), ("v", "v")} & fits:
            text = f"{attention}: k_scale and v_scale are swapped: each is what the run measured for the other"
            covers = tuple(found[attention, key].name for key in "kv")
            report.take(Finding("kv-scales-swapped", attention, text, covers=covers))
            continue
        for key in "kvq":
            if (attention, key) in values and key in amax and (key, key) not in fits:
                text = (
                    f"{attention}.{key}_scale: {values[attention, key]:.6g} is not the amax that the run measured, "
                    f"{float(amax[key]):.6g}, over {E4M3_MAX:g}"
                )
                name = found[attention, key].name
                report.take(Finding("kv-scale-not-measured", f"{attention}.{key}_scale", text, covers=(name,)))


def _is_scale_of(value: float, amax: float) -> bool:
    """Whether a scale is that of an amax: in BF16 rounded up, or ModelOpt's own in F32; 1.0 for an amax of zero."""
    exact = amax / E4M3_MAX
    return exact * (1 - 2.0**-20) <= value <= exact * (1 + 2.0**-7) or (amax == 0 and value == 1.0)


def _check_dtypes(result: Checkpoint, found: dict[tuple[str, str], Tensor], report: Report) -> None:
    """Cache scales are in the dtype that vLLM runs the model in."""
    said = dtype_said(result.config)
    if said is None and report.produced_here and any(tensor.dtype == "F16" for tensor in result.tensors.values()):
        text = "config.json says no dtype, and vLLM would go by the weights, some of which are F16"
        remedy = "serve it with --dtype bfloat16, as quantize/serve.yaml does"
        report.add("dtype-not-bfloat16", "config.json", text, remedy)
    if said not in (None, "bfloat16"):
        remedy = "serve it with --dtype bfloat16, as quantize/serve.yaml does"
        report.add("dtype-not-bfloat16", "config.json", f"config.json says {said}", remedy)
    held = "F16" if said == "float16" and not report.produced_here else "BF16"
    wide = [tensor for tensor in found.values() if tensor.dtype != held]
    if wide:
        report.add(
            "kv-scale-rounded",
            wide[0].name,
            f"{len(wide)} KV-cache scales are {wide[0].dtype}: vLLM rounds them to {held} with a warning each, and "
            "may round them down",
        )


def _check_names(
    attentions: set[str], found: dict[tuple[str, str], Tensor], names: dict[str, tuple[str, ...]], report: Report
) -> None:
    """Cache scales have the names that every vLLM takes, and there are some for all that vLLM scales."""
    joint = [tensor.name for tensor in found.values() if tensor.name.endswith(".kv_scale")]
    if joint:
        text = f"{joint[0]}: one scale for keys and values, which newer vLLMs will not take"
        report.add("kv-scale-joint", joint[0], text)
    own = [tensor.name for tensor in found.values() if re.search(r"\.[kv]_proj\.[kv]_scale$", tensor.name)]
    if own:
        text = f"{own[0]}: ModelOpt's own name; vLLM 0.24.0 was seen to refuse it on Qwen2.5-VL"
        report.add("kv-scale-modelopt-name", own[0], text)
    for key in names:
        if key not in ("k", "v") and any((a, key) not in found for a in attentions):
            report.add("attention-scale-missing", f"{key}_scale", f"there is no {key}_scale: vLLM uses 1.0 for it")


def dtype_said(config: Mapping[str, Any]) -> str | None:
    """The dtype that vLLM runs a model in: ``dtype``, in older configs ``torch_dtype``."""
    parts = (config, text_config(config))
    return next((str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
