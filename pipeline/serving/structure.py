"""The structural check of a checkpoint: what can be known without vLLM.

Every finding is a sentence about what is wrong. `contents` reads the tensors themselves; without it only
headers, config and scales are read.
"""

from __future__ import annotations

import math
import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.backends.modelopt import fused_groups
from pipeline.calibration.scales import E4M3_MAX
from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.source import Checkpoint, SourceError, Tensor, open_checkpoint, read_json
from pipeline.journal import read_identity
from pipeline.model.selection import (
    IgnoreList,
    Selection,
    attention_prefix,
    expert_modules,
    is_linear_shaped,
    select,
)

FP8 = "F8_E4M3"
SECTION = "quantization_config"
LEAST, MOST = 2.0**-40, 2.0**20  # of a KV scale: ranges from 4e-10 to 5e8


@dataclass
class Report:
    """What was checked, and what is wrong.

    Attributes:
        checkpoint: its directory, or the name it will have.
        source: what it was held against.
        checked: what is in order, a sentence each.
        problems: what is wrong.
        notes: what a careful user should know.
        proven_in_vllm: whether vLLM itself said yes, at `level` load or generate.
        level: how far the checks came.
        vllm: what vLLM said, as plain data; empty without it.
    """

    checkpoint: str
    source: str | None
    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proven_in_vllm: bool = False
    level: str = "structure"
    vllm: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain data, as quantize/verify.json holds it."""
        return {
            "checkpoint": self.checkpoint,
            "source": self.source,
            "passed": self.passed,
            "checked": self.checked,
            "problems": self.problems,
            "notes": self.notes,
            "proven_in_vllm": self.proven_in_vllm,
            "level": self.level,
            "vllm": self.vllm,
        }


def check_structure(directory: Path, source: Checkpoint | None = None, contents: bool = False) -> Report:
    """Check a quantized checkpoint.

    Args:
        directory: the checkpoint.
        source: what it was made from; every tensor of it must be accounted for.
        contents: also read every byte: against the hashes that the run recorded, and against the source.
    """
    report = Report(str(directory), source.label if source else None)
    try:
        result = open_checkpoint(directory)
    except SourceError as error:
        report.problems.append(str(error))
        return report
    report.checked.append(f"{len(result.shards)} shard(s): headers, lengths and index agree")
    section = quantization_section(result)
    if section is None:
        fp8 = any(tensor.dtype == FP8 for tensor in result.tensors.values())
        what = "vLLM will load the FP8 codes as plain weights" if fp8 else "it is not quantized, and nothing is FP8"
        report.problems.append(f"config.json has no quantization_config: {what}")
        return report
    method = _method(section)
    if method is None:
        report.problems.append(
            f"quant_method {section.get('quant_method')!r} is not known here; {' and '.join(METHODS)} are"
        )
        return report
    if method is STATIC:
        report.notes.append("static scales under compressed-tensors: weights are not compared with a source here")
    _check_scales(result, method, report)
    ignore = _check_section(section, method, report)
    _check_ignore(result, ignore, report)
    _check_cache(result, section, method, report)
    _check_tokenizer(result, source, report)
    if method.name == "modelopt":
        _check_hf_quant_config(result, section, report)
    if source is not None:
        _check_accounts(result, source, ignore, method, report)
        _check_config(result, source, report)
    if contents:
        from pipeline.serving.contents import check_bytes, check_hashes, check_numbers

        check_hashes(result, report)
        check_numbers(result, report)
        if source is not None and method is not STATIC:
            check_bytes(result, source, method.name, report)
    return report


def quantization_section(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a checkpoint says of its quantization, in the form of config.json's ``quantization_config``; None without.

    ModelOpt's older forms say the same in other words: hf_quant_config.json beside a config without a section, or that
    file's ``quantization`` within the section. vLLM reads them all.
    """
    section = checkpoint.config.get(SECTION)
    old: Any = section.get("quantization") if isinstance(section, dict) else None
    path = checkpoint.root / "hf_quant_config.json"
    if not section and path.exists():
        try:
            old = read_json(path).get("quantization")
        except SourceError:
            old = None
    if isinstance(old, dict):
        cache = {"num_bits": 8, "type": "float"} if old.get("kv_cache_quant_algo") == "FP8" else None
        fp8 = METHODS["modelopt"]
        groups = {"group_0": {"targets": ["Linear"], "weights": fp8.weights, "input_activations": fp8.inputs}}
        return {
            "quant_method": "modelopt",
            "quant_algo": old.get("quant_algo"),
            "ignore": old.get("exclude_modules") or [],
            "kv_cache_scheme": cache,
            "config_groups": groups if old.get("quant_algo") == "FP8" else {},
        }
    return section if isinstance(section, dict) and section else None


def promises_fp8_cache(checkpoint: Checkpoint) -> bool:
    """Whether the config says that the KV cache is FP8, so that vLLM uses the checkpoint's scales by itself."""
    section = quantization_section(checkpoint) or {}
    return bool(section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo") == "FP8")


def _method(section: dict[str, Any]) -> Method | None:
    method = METHODS.get(str(section.get("quant_method")))
    groups = section.get("config_groups")
    inputs = (
        [group.get("input_activations") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    if method is METHODS["compressed-tensors"] and inputs and all(_has(part, STATIC.inputs) for part in inputs):
        return STATIC
    return method


# --- methods -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """How a ``quant_method`` lays out an FP8 weight.

    Attributes:
        name: vLLM's word for it.
        weights: what a group of the config says of weights, as far as vLLM reads it.
        inputs: likewise of activations.
        static_inputs: whether every weight has an ``input_scale``.
        cache: for k, v, q and prob the tensor names that vLLM takes, from the attention's prefix on.
    """

    name: str
    weights: dict[str, Any]
    inputs: dict[str, Any]
    static_inputs: bool
    cache: dict[str, tuple[str, ...]]

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        """Of the scale of a weight with so many rows."""
        return () if self.static_inputs else (rows, 1)


METHODS = {
    "compressed-tensors": Method(
        "compressed-tensors",
        {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
        False,
        {key: (f"{key}_scale",) for key in "kvq"},
    ),
    "modelopt": Method(
        "modelopt",
        {"num_bits": 8, "type": "float", "dynamic": False},
        {"num_bits": 8, "type": "float", "dynamic": False},
        True,
        {
            "k": ("k_scale", "k_proj.k_scale"),
            "v": ("v_scale", "v_proj.v_scale"),
            "q": ("q_scale",),
            "prob": ("attn.prob_scale",),
        },
    ),
}


# compressed-tensors' scheme FP8, one static scale a tensor for weights and inputs: vLLM loads it, nothing here makes it
STATIC = Method(
    "compressed-tensors",
    {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    True,
    METHODS["compressed-tensors"].cache,
)


# --- scales ------------------------------------------------------------------------------------------


def _check_scales(result: Checkpoint, method: Method, report: Report) -> None:
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
            if bad := _bad_scales(result, scale):
                report.problems.append(f"{scale.name}: {len(bad)} scale(s) are not finite and positive, first {bad[0]}")
    if not counted:
        report.problems.append("there is no FP8 weight in this checkpoint")
    report.checked.append(f"{counted} FP8 weights: each has finite, positive scales of the right shape")
    if method.static_inputs:
        _note_unshared(result, report)


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


def _bad_scales(checkpoint: Checkpoint, tensor: Tensor) -> list[float]:
    """The values that are not finite and positive: as integers, those are the bit patterns from 1 to below Inf's."""
    formats = {"BF16": ("H", 0x7F80), "F16": ("H", 0x7C00), "F32": ("I", 0x7F800000)}
    if tensor.dtype not in formats:
        return [math.nan]
    code, infinity = formats[tensor.dtype]
    bits = array(code, read_tensor(checkpoint, tensor))
    if bits and min(bits) > 0 and max(bits) < infinity:
        return []
    return [_as_float(value, tensor.dtype) for value in bits if not 0 < value < infinity]


def _as_float(bits: int, dtype: str) -> float:
    if dtype == "F16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16 if dtype == "BF16" else bits))[0])


def scalar(checkpoint: Checkpoint, tensor: Tensor) -> float:
    """The value of a scalar tensor in BF16, F16 or F32."""
    raw = read_tensor(checkpoint, tensor)
    return _as_float(int.from_bytes(raw, "little"), tensor.dtype)


# --- config ------------------------------------------------------------------------------------------


def _check_section(section: dict[str, Any], method: Method, report: Report) -> IgnoreList:
    """The parts of the section that vLLM reads: what a group quantizes, how, and what is ignored."""
    groups = section.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    fits = [
        group
        for group in found
        if isinstance(group, dict)
        and "Linear" in (group.get("targets") or [])
        and _has(group.get("weights"), method.weights)
        and _has(group.get("input_activations"), method.inputs)
    ]
    if not fits:
        how = (
            "FP8 with a static scale a tensor, and so their inputs"
            if method.static_inputs
            else "FP8 with a scale a row and activations FP8 per token"
        )
        report.problems.append(
            f"quantization_config.config_groups: no group says that Linear weights are {how}: vLLM would read the "
            "scales wrongly"
        )
    if method.name == "compressed-tensors" and section.get("format") != "float-quantized":
        report.problems.append(f"quantization_config.format is {section.get('format')!r}, not float-quantized")
    if method.name == "modelopt" and section.get("quant_algo") != "FP8":
        report.problems.append(f"quantization_config.quant_algo is {section.get('quant_algo')!r}, not FP8")
    entries = section.get("ignore") or []
    try:
        if not isinstance(entries, list):
            raise ValueError(f"{entries!r} is no list")
        return IgnoreList(entries, method.name)
    except ValueError as error:
        report.problems.append(f"quantization_config.ignore: {error}")
        return IgnoreList([])


def _has(part: Any, wanted: dict[str, Any]) -> bool:
    return isinstance(part, dict) and all(part.get(key) == value for key, value in wanted.items())


def _check_hf_quant_config(result: Checkpoint, section: dict[str, Any], report: Report) -> None:
    """ModelOpt's older file, which vLLM reads where config.json has no section: both must say the same."""
    path = result.root / "hf_quant_config.json"
    if not path.exists():
        return
    try:
        old = read_json(path).get("quantization")
    except SourceError as error:
        report.problems.append(str(error))
        return
    if not isinstance(old, dict):
        report.problems.append("hf_quant_config.json: its quantization is no object; vLLM may fail over it")
        return
    ours = (section.get("quant_algo"), sorted(section.get("ignore") or []), bool(section.get("kv_cache_scheme")))
    theirs = (old.get("quant_algo"), sorted(old.get("exclude_modules") or []), bool(old.get("kv_cache_quant_algo")))
    if ours != theirs:
        report.problems.append("hf_quant_config.json: it says something else than config.json's quantization_config")


# --- the KV cache ------------------------------------------------------------------------------------


def _check_cache(result: Checkpoint, section: dict[str, Any], method: Method, report: Report) -> None:
    """Every attention layer has the scales that the config promises, and each is one that vLLM can use."""
    try:
        selection = select(result)
    except SourceError:
        return  # _check_ignore says so
    attentions = {
        prefix
        for name, choice in selection.choices.items()
        if choice.layer is not None
        and (prefix := attention_prefix([name], f"{choice.component}.{choice.layer}" if choice.component else ""))
    }
    scheme = section.get("kv_cache_scheme")
    known = {f"{attention}.{name}" for attention in attentions for names in method.cache.values() for name in names}
    for name in result.tensors:
        if re.search(r"\.(k|v|q|prob)_scale$", name) and name not in known:
            report.problems.append(f"{name}: vLLM loads no KV-cache scale of this name here")
    found = {
        (attention, key): result.tensors[f"{attention}.{name}"]
        for attention in attentions
        for key, names in method.cache.items()
        for name in names
        if f"{attention}.{name}" in result.tensors
    }
    if not scheme:
        if found:
            report.problems.append(
                f"{len(found)} KV-cache scales, but the config has no kv_cache_scheme: vLLM loads them and uses them "
                "only with --kv-cache-dtype fp8"
            )
        return
    if not (isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float"):
        report.problems.append(f"quantization_config.kv_cache_scheme: {scheme!r} is no FP8 scheme")
    missing = [a for a in sorted(attentions) if (a, "k") not in found or (a, "v") not in found]
    if missing:
        lost = [key for key in "kv" if (missing[0], key) not in found]
        what = "run it at scale 1.0" if len(lost) == 2 else "use the other's scale for it"
        report.problems.append(
            f"{missing[0]}: no {' and '.join(f'{key}_scale' for key in lost)}, in {len(missing)} of {len(attentions)} "
            f"layers, although the config promises an FP8 KV cache: vLLM would {what}"
        )
    values: dict[tuple[str, str], float] = {}
    for (attention, key), tensor in found.items():
        heads = method.name == "compressed-tensors" and len(tensor.shape) == 3 and tensor.shape[1:] == (1, 1)
        if tensor.shape not in ((), (1,)) and not heads:
            report.problems.append(f"{tensor.name}: shape {list(tensor.shape)}; one scale a layer is a single value")
            continue
        if bad := _bad_scales(result, tensor):
            report.problems.append(f"{tensor.name}: {bad[0]} is not finite and positive")
            continue
        if not heads:
            values[attention, key] = scalar(result, tensor)
            if not LEAST <= values[attention, key] <= MOST:
                report.problems.append(
                    f"{tensor.name}: {values[attention, key]:.3g} is out of the range that keys and values have"
                )
    ones = [a for a in sorted(attentions) if values.get((a, "k")) == 1.0 and values.get((a, "v")) == 1.0]
    if ones:
        report.problems.append(
            f"{ones[0]}: k_scale and v_scale are both 1.0, in {len(ones)} layer(s), as in an uncalibrated cache"
        )
    _check_record(result, values, report)
    _note_cache(found, attentions, method, report)


def _check_record(result: Checkpoint, values: dict[tuple[str, str], float], report: Report) -> None:
    """Scales of a run of ours against the ranges that it measured, in quantize/calibration.json."""
    path = result.root / "quantize" / "calibration.json"
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
            if (attention, key) in values and other in amax and _scale_of(values[attention, key], float(amax[other]))
        }
        if {("k", "v"), ("v", "k")} <= fits and not {("k", "k"), ("v", "v")} & fits:
            report.problems.append(
                f"{attention}: k_scale and v_scale are swapped: each is what the run measured for the other"
            )
            continue
        for key in "kvq":
            if (attention, key) in values and key in amax and (key, key) not in fits:
                report.problems.append(
                    f"{attention}.{key}_scale: {values[attention, key]:.6g} is not the range that the run measured, "
                    f"{float(amax[key]):.6g}, over {E4M3_MAX:g}"
                )


def _scale_of(value: float, amax: float) -> bool:
    """Whether a scale is that of a range: ours as BF16 rounded up, ModelOpt's own in F32; 1.0 for a range of zero."""
    exact = amax / E4M3_MAX
    return exact * (1 - 2.0**-20) <= value <= exact * (1 + 2.0**-7) or (amax == 0 and value == 1.0)


def _note_cache(found: dict[tuple[str, str], Tensor], attentions: set[str], method: Method, report: Report) -> None:
    wide = [tensor for tensor in found.values() if tensor.dtype != "BF16"]
    if wide:
        report.notes.append(
            f"{len(wide)} KV-cache scales are {wide[0].dtype}: vLLM rounds them to BF16 with a "
            "warning each, and may round them down"
        )
    own = [tensor.name for tensor in found.values() if re.search(r"\.[kv]_proj\.[kv]_scale$", tensor.name)]
    if own:
        report.notes.append(f"{own[0]}: ModelOpt's own name; vLLM 0.24.0 was seen to refuse it on Qwen2.5-VL")
    for key in method.cache:
        if key not in ("k", "v") and any((a, key) not in found for a in attentions):
            report.notes.append(f"there is no {key}_scale: vLLM uses 1.0 for it")
    kinds = ", ".join(key for key in method.cache if all((a, key) in found for a in attentions))
    report.checked.append(f"{len(attentions)} attention layers: finite, positive KV-cache scales ({kinds or 'none'})")


def _check_ignore(result: Checkpoint, ignore: IgnoreList, report: Report) -> None:
    try:
        selection = select(result)
    except SourceError as error:
        report.problems.append(str(error))
        return
    linears = {
        name.removesuffix(".weight"): tensor.dtype
        for name, tensor in result.tensors.items()
        if is_linear_shaped(tensor) and selection.choices[name].role != "embedding"
    }
    modules = {name.rpartition(".")[0] for name in result.tensors}
    for name in result.tensors:  # fused experts that stay as they are go by their experts' names in a config
        block, _, kind = name.rpartition(".")
        if block in selection.expert_layouts and kind in ("gate_up_proj", "down_proj"):
            for _, parts in expert_modules(block, kind, selection.expert_layouts[block]):
                modules.update(module for module, _, _ in parts)
    made_here = read_identity(result.root) is not None
    if not made_here:  # others list the names that transformers has; vLLM translates those as well
        linears = {
            next((alias for alias in _aliases(name) if alias in ignore), name) if name not in ignore else name: dtype
            for name, dtype in linears.items()
        }
        modules |= {alias for name in modules for alias in _aliases(name)}
    for problem in ignore.problems(linears, modules):
        idle = problem.endswith("matches nothing in this checkpoint")
        (report.notes if idle and not made_here and _is_broad(problem) else report.problems).append(problem)
    _check_renamed(result, ignore, linears, report)
    plain = sum(dtype != FP8 for dtype in linears.values())
    report.checked.append(f"{plain} plain linear weights: the config ignores each, and no FP8 weight")


def _aliases(module: str) -> Iterator[str]:
    """Other names of a module: transformers 5 puts Qwen's parts below ``model``, the hub and vLLM may not."""
    for old, new in (
        ("visual.", "model.visual."), ("model.visual.", "visual."), ("model.layers.", "model.language_model.layers."),
        ("model.language_model.layers.", "model.layers."), ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
    ):  # fmt: skip
        if module.startswith(old):
            yield new + module.removeprefix(old)


def _is_broad(problem: str) -> bool:
    """Whether an idle entry is a pattern: exporters list those for parts that a model may not have."""
    return "'re:" in problem or "*" in problem


def _check_renamed(result: Checkpoint, ignore: IgnoreList, linears: dict[str, str], report: Report) -> None:
    """Regular expressions that cover Qwen's vision tower under the checkpoint's name alone.

    vLLM calls it ``visual`` also where the checkpoint says ``model.visual``. It translates literal entries of
    compressed-tensors' list, and ModelOpt's patterns, but no regular expressions.
    """
    method = (quantization_section(result) or {}).get("quant_method")
    if method != "compressed-tensors" or not str(result.config.get("model_type")).startswith("qwen"):
        return
    for name, dtype in linears.items():
        alias = name.removeprefix("model.")
        if dtype == FP8 or not name.startswith("model.visual.") or not ignore.by_pattern(name):
            continue
        if alias not in ignore:
            report.problems.append(
                f"{name}: the config ignores it by a pattern that misses {alias}, as vLLM calls it; it would cast "
                "these weights to FP8: write re:.*visual.*, or every name"
            )
            return


def _check_tokenizer(result: Checkpoint, source: Checkpoint | None, report: Report) -> None:
    """Whether the tokenizer can be this model's: no id beyond the embedding's rows, and the image's own id.

    What a source had already is its makers' business, and noted.
    """
    path = result.root / "tokenizer.json"
    if not path.exists():
        return
    try:
        content = read_json(path)
        added = {entry["id"] for entry in content.get("added_tokens") or []}
        vocabulary = content["model"]["vocab"]
        ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        choices = select(result).choices
    except SourceError as error:
        report.problems.append(str(error))
        return
    except (KeyError, TypeError):
        return  # another library's format
    carried = source.root / "tokenizer.json" if source is not None else None
    as_before = carried is not None and carried.exists() and carried.read_bytes() == path.read_bytes()
    place, whose = (report.notes, "as in the source") if as_before else (report.problems, "it is another model's")
    rows = max((result.tensors[name].shape[0] for name, c in choices.items() if c.role == "embedding"), default=0)
    if rows and (largest := max(ids | added, default=0)) >= rows:
        place.append(f"tokenizer.json: its ids reach {largest}, the embedding has {rows} rows; {whose}")
    for key in ("image_token_id", "image_token_index"):
        value = result.config.get(key)
        if isinstance(value, int) and value >= 0 and value not in ids | added:
            place.append(f"tokenizer.json: it has no id {value}, config.json's {key}; {whose}")


def _check_config(result: Checkpoint, source: Checkpoint, report: Report) -> None:
    ours, theirs = (
        {key: value for key, value in config.items() if key != "quantization_config"}
        for config in (result.config, source.config)
    )
    if ours != theirs:
        changed = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if _means_the_same(result, source):
            report.notes.append(
                f"config.json is written anew ({', '.join(changed)}); transformers reads it as the source's"
            )
        else:
            report.problems.append(f"config.json differs from the source's in {', '.join(changed)}")
    for name in source.sidecars:
        path = result.root / name
        if name == "config.json":
            continue
        if not path.exists():
            report.problems.append(f"{name}: the source has it, the checkpoint does not")
        elif path.read_bytes() != (source.root / name).read_bytes():
            report.problems.append(f"{name}: it differs from the source's")
    report.checked.append(f"config and {len(source.sidecars) - 1} small files: as in the source")


def _means_the_same(result: Checkpoint, source: Checkpoint) -> bool:
    """Whether transformers makes the same of both configs: ModelOpt's export saves its own normal form."""
    from transformers import AutoConfig

    made = []
    for checkpoint in (result, source):
        try:
            values = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=False).to_dict()
        except Exception:  # a config that transformers cannot read means nothing in particular
            return False
        made.append(_without(values, {SECTION, "_name_or_path", "transformers_version", "dtype", "torch_dtype"}))
    return bool(made[0] == made[1])


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return value


# --- against the source ------------------------------------------------------------------------------


def _check_accounts(result: Checkpoint, source: Checkpoint, ignore: IgnoreList, method: Method, report: Report) -> None:
    selection = select(source)
    expected: set[str] = set()
    copied = quantized = 0
    for name, tensor in source.tensors.items():
        role = selection.choices[name].role
        found = result.tensors.get(name)
        if found is not None and (found.dtype, found.shape) == (tensor.dtype, tensor.shape):
            expected.add(name)
            copied += 1
            if role == "linear" and name.removesuffix(".weight") not in ignore:
                report.problems.append(f"{name}: a linear layer of the language model that was not quantized")
            continue
        if role == "tied head" and found is None:
            continue
        if role not in ("linear", "experts"):
            what = "is lost" if found is None else f"became {found.dtype} {list(found.shape)}"
            report.problems.append(f"{name}: it {what}, but it belongs to what stays as it is")
            continue
        for module, rows, columns in expected_modules(name, tensor, role, selection):
            weight = result.tensors.get(f"{module}.weight")
            expected.update((f"{module}.weight", f"{module}.weight_scale"))
            if method.static_inputs:
                expected.add(f"{module}.input_scale")
            quantized += 1
            if weight is None:
                report.problems.append(f"{module}.weight: the source has it ({name}), the checkpoint does not")
            elif (weight.dtype, weight.shape) != (FP8, (rows, columns)):
                report.problems.append(
                    f"{module}.weight: {weight.dtype} {list(weight.shape)}, expected {FP8} {[rows, columns]}"
                )
    for name in result.tensors:
        if name not in expected and not re.search(r"\.(k|v|q|prob)_scale$", name):  # those have their own check
            report.problems.append(f"{name}: the source has nothing that it could come from")
    report.checked.append(f"{len(source.tensors)} source tensors accounted for: {copied} kept, {quantized} in FP8")


def expected_modules(name: str, tensor: Tensor, role: str, selection: Selection) -> Iterator[tuple[str, int, int]]:
    """The modules, with rows and columns, that a linear weight or a block of fused experts becomes."""
    if role == "linear":
        yield name.removesuffix(".weight"), tensor.shape[0], tensor.shape[1]
        return
    block, _, kind = name.rpartition(".")
    for _, modules in expert_modules(block, kind, selection.expert_layouts[block]):
        yield from modules
