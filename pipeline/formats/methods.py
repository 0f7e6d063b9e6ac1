"""What a checkpoint says of its quantization, where and as vLLM reads it, and how the methods known here lay it out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.source import Checkpoint, SourceError, Tensor, read_json
from pipeline.formats.base import Format, every_name
from pipeline.formats.kv_scales import COMPRESSED_NAMES, MODELOPT_NAMES, MODELOPT_OWN_NAMES

SECTION = "quantization_config"
OLD_FILE = "hf_quant_config.json"
PACKED = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "F8_E8M0")  # dtypes that only quantization writes
CACHE_SCALE = re.compile(r"\.(k|v|q|prob|kv)_scale$")
# what a scale belongs to: q_proj of q_proj.weight_scale, experts.down_proj of experts.down_proj_scale_inv
ANY_SCALE = re.compile(r"(.+?)[._](?:(?:weight_|input_)?(?:global_)?scale(?:_inv|_2)?|SCB)$")
# further names for cache scales that vLLM takes (0.32, `maybe_remap_kv_scale_name`) and nothing here writes
OTHER_NAMES = {
    "k": ("attn.k_scale", "qkv_proj.k_scale", "k_proj.k_scale", "kv_scale"),
    "v": ("attn.v_scale", "qkv_proj.v_scale", "v_proj.v_scale", "kv_scale"),
    "q": ("attn.q_scale",),
}


def _plain(section: Mapping[str, Any]) -> bool:
    """compressed-tensors' per-channel FP8 with inputs per token; not weights alone, not FP8 beside other groups."""
    parts = _parts(section)
    if section.get("quant_method") != "compressed-tensors" or _inputs_are_static(parts):
        return False
    if any(not part.get("input_activations") for part in parts):  # weights alone, which vLLM knows as well
        return False
    mixed = section.get("format") == "mixed-precision" and not all(_is_plain_fp8(part) for part in parts)
    return any(_is_plain_fp8(part) for part in parts) and not mixed


def _static(section: Mapping[str, Any]) -> bool:
    parts = _parts(section)
    return (
        section.get("quant_method") == "compressed-tensors"
        and _inputs_are_static(parts)
        and all(_has(part.get("weights"), STATIC.weights) for part in parts)
    )


def _inputs_are_static(parts: list[dict[str, Any]]) -> bool:
    return bool(parts) and all(_has(part.get("input_activations"), STATIC.inputs) for part in parts)


def _modelopt(section: Mapping[str, Any]) -> bool:
    return section.get("quant_method") == "modelopt" and section.get("quant_algo") in ("FP8", None, "")


def _parts(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = section.get("config_groups")
    return [part for part in groups.values() if isinstance(part, dict)] if isinstance(groups, dict) else []


FLOAT_QUANTIZED = ("float-quantized", "naive-quantized")
COMPRESSED = Format(
    "compressed-tensors",
    {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
    {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    static_inputs=False,
    granularity="channel",
    recognizes=_plain,
    cache=every_name(COMPRESSED_NAMES),
    section_format=FLOAT_QUANTIZED,
)
MODELOPT = Format(
    "modelopt",
    {"num_bits": 8, "type": "float", "dynamic": False},
    {"num_bits": 8, "type": "float", "dynamic": False},
    static_inputs=True,
    granularity="tensor",
    recognizes=_modelopt,
    cache=every_name(MODELOPT_NAMES, MODELOPT_OWN_NAMES),
    scale_dtype="F32",
    repeatable_elsewhere=frozenset({"BF16"}),
    quant_algo="FP8",
    groups_optional=True,
    ignore_globs=True,
)
# compressed-tensors' scheme FP8, static and per-tensor for weights and inputs: vLLM loads it, nothing here makes it
STATIC = Format(
    "compressed-tensors",
    {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    static_inputs=True,
    granularity="tensor",
    recognizes=_static,
    cache=COMPRESSED.cache,
    section_format=FLOAT_QUANTIZED,
    repeatable=False,
)
# What vLLM takes for most quantization methods, whose names it remaps alike
CACHE_NAMES = MODELOPT.cache

_registered: list[Format] = [STATIC, COMPRESSED, MODELOPT]


def register(made: Format) -> None:
    """Let verification recognize another layout; the latest one is asked first."""
    _registered.insert(0, made)


def unregister(made: Format) -> None:
    """Take `register` back."""
    _registered.remove(made)


def quantization_section(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a checkpoint says of its quantization, in the form of config.json's ``quantization_config``; None without.

    vLLM looks for it in config.json, in its text_config, under compressed-tensors' older ``compression_config``, and in
    ModelOpt's hf_quant_config.json; ModelOpt's ``quantization`` within a section says the same in older words.
    """
    config = checkpoint.config
    found = (config.get(SECTION), text_config(config).get(SECTION), config.get("compression_config"))
    section = next((part for part in found if isinstance(part, dict) and part), None)
    old: Any = section.get("quantization") if section is not None else None
    path = checkpoint.root / OLD_FILE
    if section is None and not config.get(SECTION) and path.exists():
        try:
            old = read_json(path).get("quantization")
        except SourceError:
            old = None
    return _from_old(old) if isinstance(old, dict) else section


def _from_old(old: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's ``quantization`` in today's words."""
    algorithm, cache = old.get("quant_algo"), old.get("kv_cache_quant_algo")
    fp8 = {"targets": ["Linear"], "weights": MODELOPT.weights, "input_activations": MODELOPT.inputs}
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": old.get("exclude_modules") or [],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False} if cache == "FP8" else cache,
        "config_groups": {"group_0": fp8} if algorithm == "FP8" else {},
    }


def promised_cache(checkpoint: Checkpoint) -> str | None:
    """The dtype of the KV cache that ``--kv-cache-dtype auto`` means for a checkpoint; None for the model's own.

    As `vllm.utils.torch_utils.get_kv_cache_quant_algo_string` and compressed-tensors' attention layers decide it: only
    these two methods are asked, and ModelOpt's not for a section that stands in the text_config.
    """
    section = quantization_section(checkpoint) or {}
    method = str(section.get("quant_method"))
    scheme = section.get("kv_cache_scheme")
    if method == "compressed-tensors":
        return "fp8" if scheme else None
    if not method.startswith("modelopt") or (
        not checkpoint.config.get(SECTION) and SECTION in text_config(checkpoint.config)
    ):
        return None
    said = scheme or section.get("kv_cache_quant_algo")
    if isinstance(said, dict):
        if said.get("type") != "float":
            return None
        fp8 = said.get("num_bits") == 8 and said.get("dynamic") is False
        return "fp8" if fp8 else "nvfp4" if said.get("num_bits") == 4 else None
    return str(said).lower() if str(said).lower() in ("fp8", "nvfp4") else None


def is_cache_scale(tensor: Tensor) -> bool:
    """Whether a tensor is a cache scale by its name, those of Quark and AutoFP8 included, and by its shape."""
    named = CACHE_SCALE.search(tensor.name) or re.search(r"\.(k|v|q|kv)_proj\.output_scale$", tensor.name)
    return named is not None and (tensor.shape in ((), (1,)) or (len(tensor.shape) == 3 and tensor.shape[1:] == (1, 1)))


def has_cache_scales(checkpoint: Checkpoint) -> bool:
    """Whether there are scales that vLLM would use with ``--kv-cache-dtype fp8``."""
    return any(CACHE_SCALE.search(name) for name in checkpoint.tensors)


def method_of(section: Mapping[str, Any]) -> Format | None:
    """The layout that a section describes; None for one whose weights are not known here."""
    return next((known for known in _registered if known.recognizes(section)), None)


def without_scale(section: Mapping[str, Any], lost: tuple[str, ...]) -> str:
    """What vLLM 0.32 does with an FP8 cache without the scales `lost` (of k and v), by its methods' own code."""
    own = str(section.get("quant_method")).startswith("modelopt")
    if lost == ("k", "v"):
        return "run it at KV scale 1.0"
    if lost == ("k",):
        return "not start" if own else "run its keys at scale 1.0"
    return "use k_scale for its values" if own else "run its values at scale 1.0"


def _is_plain_fp8(group: dict[str, Any]) -> bool:
    """Whether a group may be meant as FP8 with per-channel scales: what is said otherwise is an error in it, then."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        return True
    others = (weights.get("num_bits") not in (8, None), weights.get("type") not in ("float", None))
    return not any(others) and weights.get("strategy") not in ("block", "group", "tensor_group", "tensor")


def describe(section: dict[str, Any]) -> str:
    """A method's name for a reader, with what tells it from others of that name."""
    more = section.get("quant_algo") or section.get("format")
    if isinstance(block := section.get("weight_block_size"), list):
        more = f"blocks of {'x'.join(str(n) for n in block)}"
    return f"{section.get('quant_method')}{f' ({more})' if more else ''}"


def _has(part: Any, wanted: Mapping[str, Any]) -> bool:
    return isinstance(part, dict) and all(part.get(key) == value for key, value in wanted.items())


def group_fits(group: Any, method: Format) -> bool:
    """Whether a group of ``config_groups`` says what `method` needs of the linear layers."""
    if not isinstance(group, dict) or not isinstance(targets := group.get("targets"), list):
        return False
    linear = any(target == "Linear" or str(target).startswith("re:") for target in targets)
    inputs = group.get("input_activations")
    inputs_fit = _has(inputs, method.inputs) if method.inputs else not inputs
    return linear and _has(group.get("weights"), method.weights) and inputs_fit


def is_weight_scale(tensor: Tensor) -> bool:
    """Whether a tensor holds scales of weights or inputs, by its name: ``weight_scale``, ``weight_scale_inv``..."""
    return re.search(r"\.(weight|input)(_global)?_scale(_inv|_2)?$", tensor.name) is not None
