"""The structural check of a checkpoint: what can be known without vLLM.

Every finding is a sentence about what is wrong. `contents` reads the tensors themselves; without it only
headers, config and scales are read.
"""

from __future__ import annotations

import math
import re
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.source import FLOAT_DTYPES, Checkpoint, SourceError, Tensor, open_checkpoint, read_json
from pipeline.formats.kv_scales import E4M3_MAX
from pipeline.formats.methods import (
    ANY_SCALE,
    CACHE_SCALE,
    COMPRESSED,
    FP8,
    MODELOPT,
    OLD_FILE,
    OTHER_NAMES,
    PACKED,
    SECTION,
    Method,
    describe,
    group_fits,
    has_cache_scales,
    is_weight_scale,
    method_of,
    promised_cache,
    quantization_section,
)
from pipeline.journal import read_identity
from pipeline.model.fused import fused_groups
from pipeline.model.ignore import IgnoreList
from pipeline.model.selection import Selection, attention_prefix, expert_modules, is_linear_shaped, select

PLAIN_FORMATS = (None, "float-quantized", "naive-quantized")
FORMATS = {"BF16": ("H", 0x7F80), "F16": ("H", 0x7C00), "F32": ("I", 0x7F800000)}  # array code, bits of infinity
LEAST, MOST = 2.0**-40, 2.0**20  # of a KV or input scale: ranges from 4e-10 to 5e8


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
        asked: how far they were to come.
        vllm: what vLLM said, as plain data; empty without it.
    """

    checkpoint: str
    source: str | None
    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proven_in_vllm: bool = False
    level: str = "structure"
    asked: str = "structure"
    vllm: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain data, as quantize/verify.json holds it; JSON has no NaN and no infinity, which become words."""
        made: dict[str, Any] = _plain(
            {
                "checkpoint": self.checkpoint,
                "source": self.source,
                "passed": self.passed,
                "checked": self.checked,
                "problems": self.problems,
                "notes": self.notes,
                "proven_in_vllm": self.proven_in_vllm,
                "level": self.level,
                "asked": self.asked,
                "vllm": self.vllm,
            }
        )
        return made


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
    except (SourceError, OSError) as error:
        report.problems.append(str(error))
        return report
    report.checked.append(f"{len(result.shards)} shard(s): headers, lengths and index agree")
    _run(report, "config.json", _check_all, result, source, contents, report)
    return report


def _check_all(result: Checkpoint, source: Checkpoint | None, contents: bool, report: Report) -> None:
    made_here = read_identity(result.root) is not None
    section = quantization_section(result)
    method = _method(result, section, made_here, report)
    if section is None and report.problems:
        return
    selection = _selection(result, method, report)
    ignore = IgnoreList([])

    def run(what: str, check: Callable[..., str | None], *args: Any) -> None:
        _run(report, what, check, *args)

    if section is not None and method is not None:
        run("scales", _check_scales, result, method, report)
        ignore = _check_section(section, method, made_here, report)
        if selection is not None:
            run("ignore list", _check_ignore, result, selection, section, ignore, made_here, report)
    elif section is not None:
        run("scales", _check_foreign_scales, result, section, report)
    if section is not None and selection is not None:
        run("KV-cache scales", _check_cache, result, selection, section, method, made_here, report)
    run("tokenizer", _check_tokenizer, result, selection, source, report)
    if method is MODELOPT and section is not None:
        run(OLD_FILE, _check_hf_quant_config, result, section, report)
    if source is not None:
        run("tensors", _check_accounts, result, source, ignore, section, method, made_here, report)
        run("config", _check_config, result, source, made_here, report)
    if contents:
        from pipeline.verify.contents import check_bytes, check_hashes, check_numbers

        run("hashes", check_hashes, result, report)
        run("numbers", check_numbers, result, report)
        if source is not None:
            run("contents", check_bytes, result, source, method, report)


def read_back(result: Checkpoint, stop: threading.Event) -> Report:
    """Every byte of a result against the hashes that its run recorded while writing, until `stop` is set."""
    from pipeline.verify.contents import check_hashes

    report = Report(str(result.root), None)
    _run(report, "hashes", check_hashes, result, report, stop)
    return report


def _run(report: Report, what: str, check: Callable[..., str | None], *args: Any) -> None:
    """Run a check. What it says is in order stands in the report if it found no problem; a config or a record whose
    values are of other kinds than they should be is a problem itself."""
    before = len(report.problems)
    try:
        said = check(*args)
    except (SourceError, OSError) as error:
        report.problems.append(f"{what}: it cannot be checked: {error}")
        return
    except Exception as error:  # a stranger's config may hold anything, and a check ends over it in any way
        text = f"{type(error).__name__}: {error}"
        report.problems.append(f"{what}: it cannot be checked, a value is not what it should be: {text}")
        return
    if said is not None and len(report.problems) == before:
        report.checked.append(said)


def _method(result: Checkpoint, section: dict[str, Any] | None, made_here: bool, report: Report) -> Method | None:
    """The layout that the config describes, and a word to the reader where there is none that is known here."""
    if section is not None:
        if made_here:
            names = {"compressed-tensors": COMPRESSED, "modelopt": MODELOPT}
            if found := names.get(str(section.get("quant_method"))):
                return found
            report.problems.append(f"quant_method {section.get('quant_method')!r} is none that this program writes")
        method = method_of(section)
        if method is None:
            report.notes.append(
                f"the layout of {describe(section)} is not known here: files, scales, numbers and what stays as it is "
                "are checked; whether it can be served says vLLM's load check alone"
            )
        return method
    codes = [tensor for tensor in result.tensors.values() if tensor.dtype in PACKED and len(tensor.shape) > 1]
    if codes or made_here:
        what = f"take the {codes[0].dtype} codes for plain weights" if codes else "serve it as it is"
        report.problems.append(
            f"{codes[0].name if codes else 'config.json'}: config.json has no {SECTION}: vLLM takes the checkpoint for "
            f"unquantized and would {what}"
        )
    elif result.config.get(SECTION) not in (None, {}):
        report.problems.append(f"config.json: its {SECTION} is {result.config[SECTION]!r}, and no object")
    else:
        report.notes.append(f"it is not quantized: config.json has no {SECTION}, and no tensor holds codes")
    return None


def _selection(result: Checkpoint, method: Method | None, report: Report) -> Selection | None:
    try:
        return select(result)
    except SourceError as error:
        # packed weights hide the linear layers of other layouts
        if method is not None or not any(tensor.dtype in ("I32", "U8") for tensor in result.tensors.values()):
            report.problems.append(str(error))
        return None


# --- scales ------------------------------------------------------------------------------------------


def _check_scales(result: Checkpoint, method: Method, report: Report) -> str:
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
    if method.static_inputs:
        _note_unshared(result, report)
        _check_inputs(result, report)
    return f"{counted} FP8 weights: each has finite, positive scales of the right shape"


def _check_foreign_scales(result: Checkpoint, section: dict[str, Any], report: Report) -> str:
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
        if bad := _bad_scales(result, tensor):
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


def _bad_scales(checkpoint: Checkpoint, tensor: Tensor) -> list[float]:
    """The values that are not finite and positive. As integers, finite positive ones are the patterns from 1 to Inf's.

    Raises:
        ValueError: no dtype that a scale has.
    """
    if tensor.dtype not in FORMATS:
        raise ValueError(f"{tensor.name} is {tensor.dtype}; scales are BF16, F16 or F32")
    code, infinity = FORMATS[tensor.dtype]
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


def _check_section(section: dict[str, Any], method: Method, made_here: bool, report: Report) -> IgnoreList:
    """The parts of the section that vLLM reads: what a group quantizes, how, and what is ignored."""
    groups = section.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    odd = [group["format"] for group in found if isinstance(group, dict) and group.get("format") not in PLAIN_FORMATS]
    if odd:
        report.problems.append(f"{SECTION}.config_groups: a group's format is {odd[0]!r}, not float-quantized")
    unsaid = method is MODELOPT and not groups and not made_here  # vLLM does not look at them there
    if not unsaid and (not found or not all(group_fits(group, method) for group in found)):
        how = (
            "FP8 with a static scale a tensor, and so their inputs"
            if method.static_inputs
            else "FP8 with a scale a row and activations FP8 per token"
        )
        report.problems.append(
            f"quantization_config.config_groups: they do not say that Linear weights are {how}: vLLM would read the "
            "scales wrongly"
        )
    for key in ("transform_config", "sparsity_config"):
        if section.get(key):
            report.problems.append(
                f"{SECTION}.{key}: vLLM would apply it to weights that are FP8 and nothing else; whoever made this "
                "checkpoint must say why it is there"
            )
    if method.name == "compressed-tensors" and section.get("format") not in PLAIN_FORMATS[1:]:
        report.problems.append(f"quantization_config.format is {section.get('format')!r}, not float-quantized")
    if method is MODELOPT and section.get("quant_algo") != "FP8":
        report.problems.append(f"quantization_config.quant_algo is {section.get('quant_algo')!r}, not FP8")
    entries = section.get("ignore") or []
    try:
        if not isinstance(entries, list):
            raise ValueError(f"{entries!r} is no list")
        return IgnoreList(entries, method.name, loose=not made_here)
    except ValueError as error:
        report.problems.append(f"quantization_config.ignore: {error}")
        return IgnoreList([])


def _check_hf_quant_config(result: Checkpoint, section: dict[str, Any], report: Report) -> None:
    """ModelOpt's older file, which vLLM reads where config.json has no section: both must say the same."""
    path = result.root / OLD_FILE
    if not path.exists() or SECTION not in result.config:
        return
    old = read_json(path).get("quantization")
    if not isinstance(old, dict):
        report.problems.append("hf_quant_config.json: its quantization is no object; vLLM may fail over it")
        return
    ours = (section.get("quant_algo"), _as_set(section.get("ignore")), bool(section.get("kv_cache_scheme")))
    theirs = (old.get("quant_algo"), _as_set(old.get("exclude_modules")), bool(old.get("kv_cache_quant_algo")))
    if ours != theirs:
        report.problems.append("hf_quant_config.json: it says something else than config.json's quantization_config")


def _as_set(entries: Any) -> set[str]:
    return {str(entry) for entry in entries or []}


# --- the KV cache ------------------------------------------------------------------------------------


def _check_cache(
    result: Checkpoint,
    selection: Selection,
    section: dict[str, Any],
    method: Method | None,
    made_here: bool,
    report: Report,
) -> str | None:
    """Every attention layer has the scales that the config promises, and each is one that vLLM can use."""
    attentions = {
        prefix
        for name, choice in selection.choices.items()
        if choice.layer is not None
        and (prefix := attention_prefix([name], f"{choice.component}.{choice.layer}" if choice.component else ""))
    }
    names = method.cache if method is not None else MODELOPT.cache  # vLLM remaps names alike for most methods
    if not made_here:
        names = {key: (*each, *OTHER_NAMES.get(key, ())) for key, each in names.items()}
    known = {f"{attention}.{name}" for attention in attentions for each in names.values() for name in each}
    for name in result.tensors:
        if method is not None and CACHE_SCALE.search(name) and name not in known:
            report.problems.append(f"{name}: vLLM loads no KV-cache scale of this name here")
    found = {
        (attention, key): result.tensors[f"{attention}.{name}"]
        for attention in attentions
        for key, each in names.items()
        for name in each
        if f"{attention}.{name}" in result.tensors
    }
    scheme, promised = section.get("kv_cache_scheme"), promised_cache(result)
    values = _cache_values(result, found, report)
    if promised is None:
        if scheme and made_here:
            report.problems.append(f"{SECTION}.kv_cache_scheme: {scheme!r} is no FP8 scheme")
        elif has_cache_scales(result):
            text = (
                f"{sum(1 for name in result.tensors if CACHE_SCALE.search(name))} KV-cache scales, but the config has "
                "no kv_cache_scheme that vLLM reads: it uses them only with --kv-cache-dtype fp8"
            )
            (report.problems if made_here else report.notes).append(text)
        return None
    if promised != "fp8":
        report.notes.append(f"the config promises a KV cache in {promised}, which is not judged here")
        return None
    if isinstance(scheme, dict):
        if not (scheme.get("num_bits") == 8 and scheme.get("type") == "float"):
            report.problems.append(f"{SECTION}.kv_cache_scheme: {scheme!r} is no FP8 scheme")
        if str(scheme.get("observer")).startswith("memoryless"):
            report.notes.append(
                f"{SECTION}.kv_cache_scheme.observer is {scheme['observer']}: it keeps the last batch's range alone, "
                "so keys and values of others may be clipped"
            )
    _say_missing(attentions, found, section, report)
    ones = [a for a in sorted(attentions) if values.get((a, "k")) == 1.0 and values.get((a, "v")) == 1.0]
    if ones:
        report.problems.append(
            f"{ones[0]}: k_scale and v_scale are both 1.0, in {len(ones)} layer(s), as in an uncalibrated cache"
        )
    if made_here:
        _check_record(result, values, report)
    return _note_cache(result, found, attentions, names, made_here, report)


def _cache_values(
    result: Checkpoint, found: dict[tuple[str, str], Tensor], report: Report
) -> dict[tuple[str, str], float]:
    """The cache scales that are single numbers, by attention and key; what vLLM could not use is a problem."""
    values: dict[tuple[str, str], float] = {}
    for (attention, key), tensor in found.items():
        heads = len(tensor.shape) == 3 and tensor.shape[1:] == (1, 1)
        if tensor.shape not in ((), (1,)) and not heads:
            report.problems.append(f"{tensor.name}: shape {list(tensor.shape)}; one scale a layer is a single value")
            continue
        if tensor.dtype not in FORMATS:
            report.problems.append(f"{tensor.name}: it is {tensor.dtype}; scales are BF16, F16 or F32")
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
    return values


def _say_missing(
    attentions: set[str], found: dict[tuple[str, str], Tensor], section: dict[str, Any], report: Report
) -> None:
    """What vLLM 0.32 does without k_scale, without v_scale and without both, by its quantization methods' own code."""
    own = str(section.get("quant_method")).startswith("modelopt")
    fate = {
        ("k", "v"): "run it at KV scale 1.0",
        ("k",): "not start" if own else "run its keys at scale 1.0",
        ("v",): "use k_scale for its values" if own else "run its values at scale 1.0",
    }
    lost: dict[tuple[str, ...], list[str]] = {}
    for attention in sorted(attentions):
        if gone := tuple(key for key in "kv" if (attention, key) not in found):
            lost.setdefault(gone, []).append(attention)
    for gone, where in lost.items():
        report.problems.append(
            f"{where[0]}: no {' and '.join(f'{key}_scale' for key in gone)}, in {len(where)} of {len(attentions)} "
            f"layers, although the config promises an FP8 KV cache: vLLM would {fate[gone]}"
        )


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


def _note_cache(
    result: Checkpoint,
    found: dict[tuple[str, str], Tensor],
    attentions: set[str],
    names: dict[str, tuple[str, ...]],
    made_here: bool,
    report: Report,
) -> str:
    said = _dtype_said(result.config)
    if made_here and said not in (None, "bfloat16"):
        report.notes.append(f"config.json says {said}: serve it with --dtype bfloat16, as quantize/serve.yaml does")
    held = "F16" if said == "float16" and not made_here else "BF16"
    wide = [tensor for tensor in found.values() if tensor.dtype != held]
    if wide:
        report.notes.append(
            f"{len(wide)} KV-cache scales are {wide[0].dtype}: vLLM rounds them to {held} with a "
            "warning each, and may round them down"
        )
    joint = [tensor.name for tensor in found.values() if tensor.name.endswith(".kv_scale")]
    if joint:
        report.notes.append(f"{joint[0]}: one scale for keys and values, which newer vLLMs will not take")
    own = [tensor.name for tensor in found.values() if re.search(r"\.[kv]_proj\.[kv]_scale$", tensor.name)]
    if own:
        report.notes.append(f"{own[0]}: ModelOpt's own name; vLLM 0.24.0 was seen to refuse it on Qwen2.5-VL")
    for key in names:
        if key not in ("k", "v") and any((a, key) not in found for a in attentions):
            report.notes.append(f"there is no {key}_scale: vLLM uses 1.0 for it")
    kinds = ", ".join(key for key in names if all((a, key) in found for a in attentions))
    return f"{len(attentions)} attention layers: finite, positive KV-cache scales ({kinds or 'none'})"


def _dtype_said(config: Mapping[str, Any]) -> str | None:
    """The dtype that vLLM runs a model in: ``dtype``, in older configs ``torch_dtype``."""
    parts = (config, text_config(config))
    return next((str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)


# --- the ignore list ---------------------------------------------------------------------------------


def _check_ignore(
    result: Checkpoint,
    selection: Selection,
    section: dict[str, Any],
    ignore: IgnoreList,
    made_here: bool,
    report: Report,
) -> str:
    linears = {
        name.removesuffix(".weight"): tensor.dtype
        for name, tensor in result.tensors.items()
        if is_linear_shaped(tensor)
        and selection.choices[name].role != "embedding"
        and (made_here or not _may_be_embedding(name, selection))
        and (tensor.dtype == FP8 or _targeted(name.removesuffix(".weight"), section))
    }
    modules = {name.rpartition(".")[0] for name in result.tensors}
    for name in result.tensors:  # fused experts that stay as they are go by their experts' names in a config
        block, _, kind = name.rpartition(".")
        if block in selection.expert_layouts and kind in ("gate_up_proj", "down_proj"):
            for _, parts in expert_modules(block, kind, selection.expert_layouts[block]):
                modules.update(module for module, _, _ in parts)
    if not made_here:  # others list the names that transformers has; vLLM translates those as well
        linears = {
            next((alias for alias in _aliases(name) if alias in ignore), name) if name not in ignore else name: dtype
            for name, dtype in linears.items()
        }
        modules |= {alias for name in modules for alias in _aliases(name)}
    for problem in ignore.problems(linears, modules):
        idle = problem.endswith("matches nothing in this checkpoint") and not made_here
        harmless = idle and (_is_broad(problem) or str(section.get("quant_method")).startswith("modelopt"))
        (report.notes if harmless else report.problems).append(problem)
    table = [n for n, t in result.tensors.items() if t.dtype == FP8 and selection.choices[n].role == "embedding"]
    if table:
        report.problems.append(f"{table[0]}: an embedding in FP8, which vLLM would take for plain weights")
    _check_renamed(result, ignore, linears, report)
    outside = [n for n, t in result.tensors.items() if t.dtype == FP8 and selection.choices[n].role == "outside"]
    if outside:
        report.notes.append(f"{outside[0]}: {len(outside)} weights outside the language model are FP8")
    plain = sum(dtype != FP8 for dtype in linears.values())
    return f"{plain} plain linear weights: the config ignores each, and no FP8 weight"


def _may_be_embedding(name: str, selection: Selection) -> bool:
    """Whether a weight outside the language model may be a table and no linear layer, of which no config speaks.

    Qwen3-VL's ``pos_embed`` is one. vLLM's loader knows for certain.
    """
    return selection.choices[name].role == "outside" and "embed" in name.split(".")[-2]


def _targeted(module: str, section: dict[str, Any]) -> bool:
    """Whether a group of compressed-tensors means this linear layer: the class Linear, its name, or a pattern of it."""
    groups = section.get("config_groups")
    targets = [t for g in groups.values() for t in g.get("targets") or []] if isinstance(groups, dict) else ["Linear"]
    return any(t == "Linear" or t == module or (t[:3] == "re:" and re.match(t[3:], module)) for t in targets)


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


def _check_tokenizer(
    result: Checkpoint, selection: Selection | None, source: Checkpoint | None, report: Report
) -> None:
    """Whether the tokenizer can be this model's: no id beyond the embedding's rows, and the image's own id.

    What a source had already is its makers' business, and noted.
    """
    path = result.root / "tokenizer.json"
    _say_unservable(result, source, report)
    if not path.exists():
        return
    found = _token_ids(path)
    if found is None:
        report.notes.append("tokenizer.json: it is not in the format that is known here; its ids are not checked")
        return
    ids, added = found
    choices = selection.choices if selection is not None else {}
    carried = source.root / "tokenizer.json" if source is not None else None
    as_before = (
        carried is not None
        and carried.exists()
        and (carried.read_bytes() == path.read_bytes() or _says_the_same(path, carried))
    )
    place, whose = (report.notes, "as in the source") if as_before else (report.problems, "it is another model's")
    rows = max((result.tensors[name].shape[0] for name, c in choices.items() if c.role == "embedding"), default=0)
    beyond = {number for number in ids | added if number >= rows}
    if rows and beyond:
        text = f"tokenizer.json: its ids reach {max(beyond)}, the embedding has {rows} rows"
        if source is None and read_identity(result.root) is None and beyond <= added and len(beyond) <= FEW_TOKENS:
            report.notes.append(f"{text}: {len(beyond)} added tokens, as CodeLlama's and Gemma's makers left them")
        else:
            place.append(f"{text}; {whose}")
    for key in ("image_token_id", "image_token_index"):
        value = result.config.get(key)
        if isinstance(value, int) and value >= 0 and value not in ids | added:
            place.append(f"tokenizer.json: it has no id {value}, config.json's {key}; {whose}")


# added beyond the embedding's rows: CodeLlama 34B has 4 (transformers, issue 26714), Gemma 3 without images has 1
FEW_TOKENS = 8
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def _say_unservable(result: Checkpoint, source: Checkpoint | None, report: Report) -> None:
    """What a server cannot start without, and exporters forget; a source that lacks it too is its makers' business."""
    missing: list[tuple[str, tuple[str, ...]]] = []
    own = any(any(result.root.glob(pattern)) for pattern in ("*.tiktoken", "*.model", "tokenization_*.py"))
    if not own and not any((result.root / name).exists() for name in TOKENIZERS):
        missing.append(("tokenizer", TOKENIZERS))
    if "vision_config" in result.config and not any((result.root / name).exists() for name in PROCESSORS):
        missing.append(("image processor", PROCESSORS))
    for what, names in missing:
        had = source is not None and any((source.root / name).exists() for name in names)
        where = report.problems if had or (source is None and read_identity(result.root) is None) else report.notes
        where.append(f"{names[0]}: there is no {what}, without which vLLM does not start; copy it from the source")


def _token_ids(path: Path) -> tuple[set[int], set[int]] | None:
    """The ids of a tokenizer.json's vocabulary and of its added tokens; None for another library's format."""
    content = read_json(path)
    try:
        added = {entry["id"] for entry in content.get("added_tokens") or []}
        vocabulary = content["model"]["vocab"]
        return (set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))), added
    except (KeyError, TypeError):
        return None


def _check_config(result: Checkpoint, source: Checkpoint, made_here: bool, report: Report) -> str:
    ours, theirs = (
        {key: value for key, value in config.items() if key != "quantization_config"}
        for config in (result.config, source.config)
    )
    if ours != theirs:
        changed = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if not made_here and set(changed) <= {"transformers_version", "_name_or_path"}:
            report.notes.append(
                f"config.json differs from the source's in {', '.join(changed)}, which says who wrote it"
            )
        elif _means_the_same(result, source):
            report.notes.append(
                f"config.json is written anew ({', '.join(changed)}); transformers reads it as the source's"
            )
        else:
            report.problems.append(f"config.json differs from the source's in {', '.join(changed)}")
    same = 0
    for name in source.sidecars:
        path = result.root / name
        if name == "config.json":
            continue
        grave = made_here or _is_served(name)
        if not path.exists():
            (report.problems if grave else report.notes).append(f"{name}: the source has it, the checkpoint does not")
        elif path.read_bytes() == (source.root / name).read_bytes():
            same += 1
        elif made_here or not _says_the_same(path, source.root / name):
            (report.problems if grave else report.notes).append(f"{name}: it differs from the source's")
    return f"config as the source's, {same} of {len(source.sidecars) - 1} small files byte for byte"


def _is_served(name: str) -> bool:
    """Whether a server answers otherwise with another of these files, unlike a licence or a picture."""
    return name == "tokenizer.json" or name.endswith((".model", ".tiktoken"))


def _says_the_same(path: Path, other: Path) -> bool:
    """Whether two JSON files mean the same: exporters write their versions into them, and tokenizers in a new order."""
    if path.suffix != ".json":
        return False
    try:
        ours, theirs = ({**read_json(each)} for each in (path, other))
    except SourceError:
        return False
    if path.name == "tokenizer.json":
        return _vocabulary(ours) == _vocabulary(theirs) and _token_ids(path) == _token_ids(other)
    for each in (ours, theirs):
        for key in ("transformers_version", "_from_model_config", "processor_class", "tokenizer_class"):
            each.pop(key, None)
    return ours == theirs


def _vocabulary(content: dict[str, Any]) -> Any:
    """The model of a tokenizer.json: newer libraries write pairs for merges, and keys that say what was the default."""
    model = content.get("model")
    if not isinstance(model, dict):
        return model
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    return {**{key: value for key, value in model.items() if value not in (None, False, "")}, "merges": merges}


def _means_the_same(result: Checkpoint, source: Checkpoint) -> bool:
    """Whether transformers makes the same of both configs: ModelOpt's export saves its own normal form."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of its own classes here
    made = []
    for checkpoint in (result, source):
        try:
            values = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=False).to_dict()
        except Exception:  # a config that transformers cannot read means nothing in particular
            return False
        values.pop(SECTION, None)
        made.append(_without(values, {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}))
    same_dtype = _dtype_said(result.config) == _dtype_said(source.config)  # parts may say it more than once
    return bool(same_dtype and made[0] == made[1])


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return value


# --- against the source ------------------------------------------------------------------------------


def _check_accounts(
    result: Checkpoint,
    source: Checkpoint,
    ignore: IgnoreList,
    section: dict[str, Any] | None,
    method: Method | None,
    made_here: bool,
    report: Report,
) -> str:
    selection = select(source)
    expected: set[str] = set()
    cast: list[str] = []
    copied = quantized = 0
    packed = _packed(result)

    def stays(module: str) -> bool:
        names = (module,) if made_here else (module, *_aliases(module))
        return any(name in ignore for name in names) or not _targeted(module, section or {})

    for name, tensor in source.tensors.items():
        role = selection.choices[name].role
        found, owner = result.tensors.get(name), name.removesuffix(".weight")
        alike = found if found is not None and found.shape == tensor.shape else None
        kept = alike is not None and alike.dtype == tensor.dtype
        if alike is not None and (kept or (not made_here and {alike.dtype, tensor.dtype} <= {*FLOAT_DTYPES})):
            expected.add(name)
            copied += 1
            if not kept:
                cast.append(f"{name} is {alike.dtype}")
            if method is not None and role == "linear" and not stays(owner):
                report.problems.append(f"{name}: a linear layer of the language model that was not quantized")
            continue
        if role == "tied head" and found is None:
            continue
        scale = f"{owner}.weight_scale"
        if role == "outside" and not made_here and alike and alike.dtype == FP8 and scale in result.tensors:
            expected.update((name, scale, f"{owner}.input_scale"))
            quantized += 1
            continue
        if role not in ("linear", "experts"):
            what = "is lost" if found is None else f"became {found.dtype} {list(found.shape)}"
            report.problems.append(f"{name}: it {what}, but it belongs to what stays as it is")
            continue
        if method is None:  # what its weights became may have other names and shapes
            plain = found is not None and found.dtype not in PACKED
            parts = (name, *(each for each, _, _ in expected_modules(name, tensor, role, selection)))
            if any(part in packed for part in parts) and not plain:
                quantized += 1
            else:
                what = "is lost" if found is None else f"became {found.dtype} {list(found.shape)}"
                report.problems.append(f"{name}: it {what}, and there are no codes in its place")
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
    for name in result.tensors if method is not None else ():
        if name not in expected and not CACHE_SCALE.search(name):  # those have their own check
            report.problems.append(f"{name}: the source has nothing that it could come from")
    if cast:
        report.notes.append(f"{cast[0]}, unlike the source's, {len(cast)} in all: rounded once more, or made wider")
    what = "in FP8" if method is not None else "of the language model's linear layers quantized, as it seems"
    return f"{len(source.tensors)} source tensors accounted for: {copied} kept, {quantized} {what}"


def _packed(result: Checkpoint) -> set[str]:
    """What has codes: the names of tensors that hold some, of the modules that these belong to, and of fused blocks."""
    found: set[str] = set()
    for name, tensor in result.tensors.items():
        if tensor.dtype in PACKED and len(tensor.shape) > 1 and not ANY_SCALE.match(name):
            found |= {name, name.rpartition(".")[0], re.sub(r"_(blocks|packed)$", "", name)}
    return found


def expected_modules(name: str, tensor: Tensor, role: str, selection: Selection) -> Iterator[tuple[str, int, int]]:
    """The modules, with rows and columns, that a linear weight or a block of fused experts becomes."""
    if role == "linear":
        yield name.removesuffix(".weight"), tensor.shape[0], tensor.shape[1]
        return
    block, _, kind = name.rpartition(".")
    for _, modules in expert_modules(block, kind, selection.expert_layouts[block]):
        yield from modules
