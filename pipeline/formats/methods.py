"""What a checkpoint says of its quantization, where and as vLLM reads it, and how the methods known here lay it out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.source import Checkpoint, SourceError, Tensor, read_json

FP8 = "F8_E4M3"
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


@dataclass(frozen=True)
class Method:
    """How a ``quant_method`` lays out an FP8 weight.

    Attributes:
        name: vLLM's word for it.
        weights: what a group of the config says of weights, as far as vLLM reads it.
        inputs: likewise of activations.
        static_inputs: whether every weight has an ``input_scale``.
        cache: for k, v, q and prob the tensor names that vLLM takes, from the attention's prefix on.
        repeatable: whether the weights can be quantized once more here, to be compared bit by bit.
    """

    name: str
    weights: dict[str, Any]
    inputs: dict[str, Any]
    static_inputs: bool
    cache: dict[str, tuple[str, ...]]
    repeatable: bool = True

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        """Of the scale of a weight with so many rows."""
        return () if self.static_inputs else (rows, 1)


COMPRESSED = Method(
    "compressed-tensors",
    {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
    {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    False,
    {key: (f"{key}_scale",) for key in "kvq"},
)
MODELOPT = Method(
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
)
# compressed-tensors' scheme FP8, one static scale a tensor for weights and inputs: vLLM loads it, nothing here makes it
STATIC = Method(
    "compressed-tensors",
    {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    True,
    COMPRESSED.cache,
    repeatable=False,
)


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


def has_cache_scales(checkpoint: Checkpoint) -> bool:
    """Whether there are scales that vLLM would use with ``--kv-cache-dtype fp8``."""
    return any(CACHE_SCALE.search(name) for name in checkpoint.tensors)


def method_of(section: dict[str, Any]) -> Method | None:
    """The method that a section describes; None for one whose weights are not known here."""
    name = section.get("quant_method")
    if name == "modelopt":
        return MODELOPT if section.get("quant_algo") == "FP8" or not section.get("quant_algo") else None
    if name != "compressed-tensors":
        return None
    groups = section.get("config_groups")
    parts = [part for part in groups.values() if isinstance(part, dict)] if isinstance(groups, dict) else []
    if parts and all(_has(part.get("input_activations"), STATIC.inputs) for part in parts):
        return STATIC if all(_has(part.get("weights"), STATIC.weights) for part in parts) else None
    if any(not part.get("input_activations") for part in parts):  # weights alone, which vLLM knows as well
        return None
    mixed = section.get("format") == "mixed-precision" and not all(_is_plain_fp8(part) for part in parts)
    return COMPRESSED if any(_is_plain_fp8(part) for part in parts) and not mixed else None


def _is_plain_fp8(group: dict[str, Any]) -> bool:
    """Whether a group may be meant as FP8 with a scale a row: what is said otherwise is an error in it, then."""
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


def _has(part: Any, wanted: dict[str, Any]) -> bool:
    return isinstance(part, dict) and all(part.get(key) == value for key, value in wanted.items())


def group_fits(group: Any, method: Method) -> bool:
    """Whether a group of ``config_groups`` says what `method` needs of the linear layers."""
    if not isinstance(group, dict) or not isinstance(targets := group.get("targets"), list):
        return False
    linear = any(target == "Linear" or str(target).startswith("re:") for target in targets)
    return linear and _has(group.get("weights"), method.weights) and _has(
        group.get("input_activations"), method.inputs
    )  # fmt: skip


def is_weight_scale(tensor: Tensor) -> bool:
    """Whether a tensor holds scales of weights or inputs, by its name: ``weight_scale``, ``weight_scale_inv``..."""
    return re.search(r"\.(weight|input)(_global)?_scale(_inv|_2)?$", tensor.name) is not None
