"""The serving profile: quantize/serve.yaml, for ``vllm serve DIR --config DIR/quantize/serve.yaml``.

What the recipe's ``serve`` says, and for the rest what the checkpoint implies. Names are those of vLLM's arguments;
`vllm_env.jobs.arguments` holds a profile against the vLLM that is installed, and asks it what the KV cache takes. Here
are bounds of that: a plan is refused for what is needed at least, a length is chosen by what is needed at most.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.result import PROFILE
from pipeline.errors import PipelineError, UsageError
from pipeline.library_messages import quiet
from pipeline.recipe.sections import MAX_TOKENS, RopeScaling, Serve
from pipeline.units import parse_size
from pipeline.vllm_env.serve_arguments import name_problem

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe

LONGEST = 32768  # tokens of context that a profile asks for by itself; more costs memory that few requests use
UNSAID = 2048  # tokens of context that vLLM takes where nothing says how many positions a model has
# Beside weights and cache on each GPU: CUDA's context, graphs and the activations of the longest prefill.
# On an H200 with vLLM 0.24.0 and 8192 tokens a prefill it was measured below this for a 3B model; see docs/serving.md.
OVERHEAD = 4 << 30
BLOCK = 128  # tokens that vLLM allots at once, at most
# where vLLM 0.32 looks for the number of positions; the least of them counts
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
              "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
# where it counts these scaled already, or there is nothing to scale; of any other kind it multiplies them by the factor
_ROPE_UNSCALED = ("default", "mrope", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
_SLIDING = ("sliding_window", "layer_types")
_KINDS = ("sliding_window", "attention_chunk_size", "full_attention_interval")  # not every layer keeps every token
_BY_CLASS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
             "max_position_embeddings", "kv_lora_rank", "qk_rope_head_dim", "num_kv_shared_layers", "rope_parameters",
             *_SLIDING)  # fmt: skip


@dataclass(frozen=True)
class Cache:
    """What the KV cache of a model takes on one GPU.

    Attributes:
        layer: bytes of a token in one layer; 0 where neither config.json nor transformers tells.
        layers: all that may keep a token.
        full: those that keep every token for certain.
        sliding: those that keep the tokens of a window.
        window: its tokens.
    """

    layer: int
    layers: int
    full: int
    sliding: int = 0
    window: int = 0

    @property
    def per_token(self) -> int:
        """Bytes of a token that all layers keep."""
        return self.layer * self.layers

    def at_most(self, length: int) -> int:
        """Bytes of one sequence of `length` tokens if every layer keeps all of it.

        Where there are two kinds of layers vLLM fills groups of them up, with fewer than there are of the rarer kind,
        and a window begins anywhere in a block.
        """
        blocks = -(-length // BLOCK) + (self.layers > self.full)
        return self.layer * (self.layers + min(self.full, self.layers - self.full)) * blocks * BLOCK

    def at_least(self, length: int) -> int:
        """Bytes that one sequence of `length` tokens takes in any case."""
        return self.layer * (self.full * length + self.sliding * min(length, self.window))


@dataclass(frozen=True)
class Fit:
    """What one GPU holds.

    Attributes:
        weights: bytes of the checkpoint, divided over the GPUs.
        cache: what sequences take.
        room: bytes for the cache, after weights and overhead; negative where not even those fit. None: no GPU was
            stated.
    """

    weights: int
    cache: Cache
    room: int | None


def cache_bytes_per_token(config: Mapping[str, Any], width: int, parallel: int = 1) -> int:
    """Bytes of KV cache that a token takes on one GPU, over all layers, at most; 0 where nothing tells.

    Keys and values, ``num_key_value_heads * head_dim`` of each a layer; heads are divided over GPUs and repeated where
    there are fewer heads than GPUs. Multi-head latent attention keeps one vector a layer, whole on every GPU. Layers
    with a sliding window count in full.

    Args:
        config: the checkpoint's.
        width: bytes a value: 1 in FP8, 2 in BF16.
        parallel: GPUs that share the model.
    """
    return _cache(_language(config), width, parallel).per_token


def cache_dtype(serve: Serve, fp8_cache: bool) -> str:
    """The --kv-cache-dtype that the profile will say.

    Raises:
        UsageError: FP8 without scales in the checkpoint; vLLM would run it at scale 1.0.
    """
    asked = serve.kv_cache_dtype or ("fp8" if fp8_cache else "auto")
    if asked.startswith("fp8") and not fp8_cache:
        raise UsageError(
            f"serve.kv_cache_dtype: {asked} with kv_cache: none would run the attention at KV scale 1.0",
            remedy="choose kv_cache: fp8, or leave it out",
        )
    return asked


def fit(serve: Serve, config: Mapping[str, Any], weights: int, fp8_cache: bool) -> Fit:
    """What `serve`'s GPU would hold; see `Fit`.

    Args:
        serve: the recipe's section.
        config: the checkpoint's config.
        weights: bytes of the result.
        fp8_cache: whether the checkpoint holds KV scales.
    """
    share = -(-weights // serve.tensor_parallel_size)
    width = 1 if _is_narrow(serve, fp8_cache) else 2
    cache = _cache(_language(config), width, serve.tensor_parallel_size)
    if serve.gpu_memory is None:
        return Fit(share, cache, None)
    return Fit(share, cache, cache_room(serve.gpu_memory, serve.gpu_memory_utilization, share))


def cache_room(gpu_memory: str, utilization: float, weights: int) -> int:
    """Bytes that one GPU has for the cache, beside `weights` bytes of the model and vLLM's own; may be negative.

    Raises:
        ValueError: `gpu_memory` is no size.
    """
    return int(parse_size(gpu_memory) * utilization) - weights - OVERHEAD


def stated_memory(text: str) -> str | None:
    """The GPU's memory that a profile was written for: its head says it, since no argument of vLLM's does."""
    found = re.search(r"^# In (.+) there is room for ", text, re.MULTILINE)
    return found[1] if found else None


def stated_dtype(text: str) -> str | None:
    """The --dtype that a profile says; None where it leaves it to vLLM, or is no profile."""
    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    found = said.get("dtype") if isinstance(said, dict) else None
    return found if isinstance(found, str) else None


def arguments(
    serve: Serve,
    config: Mapping[str, Any],
    name: str,
    weights: int,
    fp8_cache: bool,
    dtypes: Collection[str] = (),
) -> dict[str, Any]:
    """vLLM's arguments, by name.

    Args:
        serve: the recipe's section.
        config: the checkpoint's config.
        name: served under, where the recipe gives none.
        weights: bytes of the result.
        fp8_cache: whether the checkpoint holds KV scales.
        dtypes: of the source's tensors, in safetensors' words: vLLM goes by them where the config gives no dtype.

    Raises:
        UsageError: the stated GPU cannot hold it, or vLLM cannot run this model so: its heads on so many GPUs, its
            positions to such a length.
    """
    text = _language(config)
    _check_parallel(serve, config, text)
    if serve.served_model_name is None and (why := name_problem(name)):
        raise UsageError(f"output: {name!r} would be the served name, and {why}; or give serve.served_model_name")
    scaled = _yarn(serve.rope_scaling, config) if serve.rope_scaling is not None else None
    made: dict[str, Any] = {
        "served-model-name": serve.served_model_name or name,
        "kv-cache-dtype": cache_dtype(serve, fp8_cache),
        "max-model-len": _length(serve, text, fit(serve, config, weights, fp8_cache)),
        "gpu-memory-utilization": serve.gpu_memory_utilization,
        "tensor-parallel-size": serve.tensor_parallel_size,
    }
    if serve.max_num_seqs is not None:
        made["max-num-seqs"] = serve.max_num_seqs
    if limits := _limits(serve, config):
        made["limit-mm-per-prompt"] = limits
    if scaled is not None:
        made["hf-overrides"] = scaled
    if _other_dtypes(config, dtypes):
        made["dtype"] = "bfloat16"
    return made | serve.extra


def write(recipe: Recipe, config: Mapping[str, Any], weights: int, dtypes: Collection[str] = ()) -> str:
    """The profile as YAML, with the launch line and the memory it counts on as comments.

    Args:
        recipe: validated.
        config: the checkpoint's config.
        weights: bytes of the result.
        dtypes: see `arguments`.

    Raises:
        UsageError: see `arguments`.
    """
    serve, fp8_cache, name = recipe.serve, recipe.kv_cache == "fp8", Path(recipe.output).name
    made = arguments(serve, config, name, weights, fp8_cache, dtypes)
    place = f"./{name}" if name.startswith("-") else name
    if why := name_problem(place):  # a served name of its own does not mend the directory's
        raise UsageError(f"output: {name!r} cannot stand in the profile's launch line: {why}")
    lines = [f"#   {shlex.join(['vllm', 'serve', place, '--config', f'{place}/{PROFILE}'])}", "#"]
    lines += _memory(serve, fit(serve, config, weights, fp8_cache), made["max-model-len"], fp8_cache)
    if serve.rope_scaling is None and _positions(_language(config)) is None:
        lines.append("# Nothing says how many positions the model has: max-model-len could not be held against them.")
    if "dtype" not in serve.extra and (other := _other_dtypes(config, dtypes)):
        says = "config says" if _said_dtypes(config) else "config says nothing, and vLLM would go by the weights:"
        lines.append(
            f"# dtype: the {says} {' and '.join(other)}, but the scales were measured and are written in BF16; "
            "a server in another type warns of each."
        )
    return "\n".join([*lines, ""]) + yaml.safe_dump(made, sort_keys=False)


def _memory(serve: Serve, found: Fit, length: int, fp8_cache: bool) -> list[str]:
    """What the profile's head says of memory, as comments."""
    cache = found.cache
    each = f" on each of {serve.tensor_parallel_size} GPUs" if serve.tensor_parallel_size > 1 else ""
    weights = f"# Weights take {found.weights / 1e9:.1f} GB{each}"
    if not cache.per_token:
        held = "the weights alone were held against the GPU" if found.room is not None else "no length was checked"
        return [f"{weights}; neither config.json nor transformers tells what a token of cache takes: {held}."]
    kind, one = "FP8" if _is_narrow(serve, fp8_cache) else "BF16", cache.at_most(length)
    most, more = (" at most", " at least") if cache.layers > cache.full else ("", " about")
    lines = [
        f"{weights}; a token of {kind} cache {cache.per_token / 1e3:.0f} kB{most}, a sequence of {length:,} tokens "
        f"{one / 1e9:.1f} GB{most}."
    ]
    if found.room is not None:
        lines.append(
            f"# In {serve.gpu_memory} there is room for{more} {int(found.room / one * length):,} tokens of cache: "
            f"{found.room / one:.1f} sequences of full length."
        )
    return lines


# --- what the config says ----------------------------------------------------------------------------


def _language(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the language model, and for what it leaves out, what the model's class has as default.

    A nested part is saved without what its class has as default: LLaVA's and Gemma 3's on the hub name neither heads
    nor positions; a flat config is saved whole, so that the class is asked, which takes seconds and torch, only where
    layers or heads go by other names. Which layers have a sliding window, or no such cache at all, is the class's word,
    where it is not said layer by layer.
    """
    text = text_config(config)
    needed = ["num_hidden_layers", "num_attention_heads"]
    if text is not config:
        needed += ["num_key_value_heads", "max_position_embeddings"]
    if text.get("head_dim") is None:
        needed.append("hidden_size")
    kinds = any(text.get(key) for key in _KINDS) and not text.get("layer_types")
    if not kinds and all(text.get(key) is not None for key in needed):
        return text
    known = _by_class(text if "model_type" in text else config)
    said = {key: value for key, value in text.items() if value is not None and not (known and key in _SLIDING)}
    return {**known, **said}


def _by_class(part: Mapping[str, Any]) -> dict[str, Any]:
    """`class_values`, in a process of its own where torch is not loaded: a run without data does without its memory."""
    return dict(_asked(json.dumps(part, sort_keys=True)))


@lru_cache(maxsize=8)
def _asked(text: str) -> Mapping[str, Any]:
    if "torch" in sys.modules:
        return class_values(json.loads(text))
    ask = (
        "import json, sys; from pipeline.serving.profile import class_values as values; "
        "print(json.dumps(values(json.load(sys.stdin))))"
    )
    done = subprocess.run([sys.executable, "-c", ask], input=text, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise PipelineError(f"transformers could not be asked about this model: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def class_values(part: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values as transformers' class of it has them; nothing where it has no class, or that refuses it.

    Args:
        part: the language model's config, or the whole.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # seconds, with torch

    try:
        with quiet():
            made = CONFIG_MAPPING[part["model_type"]](**part).get_text_config()
    except Exception:  # whatever a class makes of a config that is not its own
        return {}
    return {key: value for key in _BY_CLASS if (value := getattr(made, key, None)) is not None}


def _count(part: Mapping[str, Any], key: str) -> int:
    """A positive number of a config, or 0."""
    value = part.get(key)
    return value if type(value) is int and value > 0 else 0


def _cache(text: Mapping[str, Any], width: int, parallel: int) -> Cache:
    layers, heads = _count(text, "num_hidden_layers"), _count(text, "num_attention_heads")
    if latent := _count(text, "kv_lora_rank"):
        each = latent + _count(text, "qk_rope_head_dim")
    else:
        head = _count(text, "head_dim") or (_count(text, "hidden_size") // heads if heads else 0)
        each = 2 * -(-(_count(text, "num_key_value_heads") or heads) // parallel) * head
    window = 0 if text.get("use_sliding_window") is False else _count(text, "sliding_window")
    if isinstance(kinds := text.get("layer_types"), list):
        own = kinds[: max(0, layers - _count(text, "num_kv_shared_layers"))]  # the last ones use the cache of others
        return Cache(each * width, layers, own.count("full_attention"), own.count("sliding_attention"), window)
    pattern = _count(text, "sliding_window_pattern")  # one layer in so many has none; without it, all have one
    full = (layers // pattern if pattern else 0) if window else layers
    return Cache(each * width, layers, full, layers - full, window)


def _is_narrow(serve: Serve, fp8_cache: bool) -> bool:
    return fp8_cache and cache_dtype(serve, fp8_cache) != "bfloat16"


def _positions(text: Mapping[str, Any]) -> int | None:
    return min((found for key in _POSITIONS if (found := _count(text, key))), default=None)


def _limit(serve: Serve, text: Mapping[str, Any]) -> int | None:
    """Tokens of the longest context that vLLM takes; None where nothing tells."""
    if serve.rope_scaling is not None:
        return _scaled(serve.rope_scaling)
    positions = _positions(text)
    if positions is None or "gemma3" in str(text.get("model_type")):  # which has its own scaled already
        return positions
    own = text.get("rope_parameters") or text.get("rope_scaling")
    each = own.values() if isinstance(own, dict) and any(isinstance(v, dict) for v in own.values()) else [own]
    for part in each:
        if isinstance(part, dict) and str(part.get("rope_type") or part.get("type") or "default") not in _ROPE_UNSCALED:
            factor = part.get("factor")
            if isinstance(factor, int | float) and 0 < factor <= MAX_TOKENS:
                return int(min(positions, MAX_TOKENS) * factor)
    return positions


def _wanted(serve: Serve, text: Mapping[str, Any]) -> int:
    """Tokens of context before the GPU's room is looked at."""
    limit = _limit(serve, text)
    return serve.max_model_len or (limit if serve.rope_scaling is not None and limit else min(limit or UNSAID, LONGEST))


def _other_dtypes(config: Mapping[str, Any], dtypes: Collection[str] = ()) -> list[str]:
    """The types but BF16 that a config gives, on top or in the language model's part.

    Where it gives none, vLLM 0.32 goes by the weights: those in F16, and in F32 where none is in BF16, would be it.
    """
    if said := _said_dtypes(config):
        return sorted(said - {"bfloat16"})
    if "F16" in dtypes:
        return ["float16"]
    return ["float32"] if "F32" in dtypes and "BF16" not in dtypes else []


def _said_dtypes(config: Mapping[str, Any]) -> set[str]:
    """The types that a config gives; those of other parts where neither it nor the language model's part gives one."""

    def said(*parts: Any) -> set[str]:
        keys = ("dtype", "torch_dtype")
        values = [part[key] for part in parts if isinstance(part, dict) for key in keys if part.get(key)]
        return {str(value).removeprefix("torch.") for value in values}

    return said(config, text_config(config)) or said(config.get("vision_config"), config.get("encoder_config"))


def _limits(serve: Serve, config: Mapping[str, Any]) -> dict[str, int]:
    """The --limit-mm-per-prompt; empty for a language model, which takes none."""
    asked = serve.limit_mm_per_prompt.model_dump(exclude_none=True) if serve.limit_mm_per_prompt is not None else {}
    if asked and not any(word in key for key in config for word in ("vision", "visual", "image", "audio", "thinker")):
        raise UsageError(
            f"serve.limit_mm_per_prompt: {', '.join(asked)}: this model takes text alone", remedy="leave it out"
        )
    if asked or "vision_config" not in config:
        return asked
    return {"image": 4, **({"video": 0} if "video_token_id" in config or "video_token_index" in config else {})}


# --- what vLLM would refuse --------------------------------------------------------------------------


def _check_parallel(serve: Serve, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """vLLM divides heads evenly over GPUs, and gives the same KV head to several where there are fewer."""
    size, where = serve.tensor_parallel_size, "serve.tensor_parallel_size"
    heads = _count(text, "num_attention_heads")
    if heads % size:
        raise UsageError(f"{where}: {heads} attention heads cannot be divided over {size} GPUs; vLLM refuses that")
    kv_heads = _count(text, "num_key_value_heads") or heads
    if kv_heads and not _count(text, "kv_lora_rank") and max(kv_heads, size) % min(kv_heads, size):
        raise UsageError(
            f"{where}: {kv_heads} KV heads can neither be divided over {size} GPUs nor repeated evenly on them; vLLM "
            "refuses that"
        )
    vision = config.get("vision_config")
    if not isinstance(vision, dict) or str(vision.get("model_type")).startswith("intern"):
        return  # where they do not divide, vLLM keeps the attention of InternVL's tower whole on every GPU
    seeing = _count(vision, "num_heads") or _count(vision, "num_attention_heads")
    if seeing % size and serve.extra.get("mm-encoder-tp-mode") != "data":
        raise UsageError(
            f"{where}: the vision tower's {seeing} heads cannot be divided over {size} GPUs; vLLM refuses that, unless "
            "serve.extra has mm-encoder-tp-mode: data"
        )


def _length(serve: Serve, text: Mapping[str, Any], found: Fit) -> int:
    """The --max-model-len, in tokens, after it was held against the model and the GPU."""
    limit, length = _limit(serve, text), _wanted(serve, text)
    if limit is not None and length > limit:
        raise UsageError(
            f"serve.max_model_len: {length:,} tokens, the model has {limit:,} positions",
            remedy="lower it, or state serve.rope_scaling (YaRN) if the model was made for it",
        )
    if found.room is None:
        return length
    parallel = f" on each of {serve.tensor_parallel_size} GPUs" if serve.tensor_parallel_size > 1 else ""
    stated = f"{serve.gpu_memory} x {serve.gpu_memory_utilization:g}"
    if found.room <= 0:
        raise UsageError(
            f"serve.gpu_memory: {found.weights / 1e9:.1f} GB of weights{parallel} and {OVERHEAD / 1e9:.1f} GB for "
            f"vLLM do not fit into {stated}",
            remedy="raise serve.tensor_parallel_size or serve.gpu_memory_utilization",
        )
    if serve.max_model_len is None and (fits := _longest(found.cache.at_most, found.room, length)) < length:
        length = max(min(length, 1024), fits // 1024 * 1024)
    if (fits := _longest(found.cache.at_least, found.room, length)) < length:
        least = " at least" if found.cache.layers > found.cache.full else ""
        raise UsageError(
            f"serve.max_model_len: one sequence of {length:,} tokens takes{least} "
            f"{found.cache.at_least(length) / 1e9:.1f} GB of cache, {found.room / 1e9:.1f} GB of {stated} are left "
            f"beside the weights{parallel}: at most {fits:,} tokens"
        )
    return length


def _longest(bytes_of: Callable[[int], int], room: int, most: int) -> int:
    """Tokens of the longest sequence whose `bytes_of` fit into `room`, `most` at most."""
    return bisect_right(range(1, most + 1), room, key=bytes_of)


# --- YaRN --------------------------------------------------------------------------------------------


def _scaled(scaling: RopeScaling) -> int:
    return int(scaling.factor * scaling.original_max_position_embeddings)


def _yarn(scaling: RopeScaling, config: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN as a config override: transformers 5's ``rope_parameters``, and the scaled number of positions.

    vLLM 0.32.0 takes ``max_position_embeddings`` to be scaled already. What the model's own rotary embedding says
    (theta, the sections of a multimodal one) stays.
    """
    text = _language(config)
    own = _rotary(config, text)
    _check_yarn(scaling, str(text.get("model_type", config.get("model_type"))), _positions(text), own)
    override = {
        "rope_parameters": {
            **{key: value for key, value in own.items() if key not in ("type", "rope_type")},
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        "max_position_embeddings": _scaled(scaling),
    }
    return {"text_config": override} if "vision_config" in config or text_config(config) is not config else override


def _rotary(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own rotary parameters, with a theta.

    Raises:
        UsageError: it has none that YaRN could be written for, or no theta is known.
    """
    said = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(said, dict):
        raise UsageError(
            f"serve.rope_scaling: config.json has {str(said)[:60]!r} for this model's rotary parameters, which is no "
            "mapping",
            remedy="fix it there, or leave it out",
        )
    own = dict(said)
    kinds = {str(part.get("model_type")) for part in (config, text)}
    if (
        any(isinstance(value, dict) for value in own.values())
        or any(kind.startswith("gemma3") for kind in kinds)
        or "rope_local_base_freq" in text
    ):
        raise UsageError(
            "serve.rope_scaling: this model has rotary parameters of its own for each kind of attention; YaRN is not "
            "written for it"
        )
    if "thinker_config" in config:
        raise UsageError("serve.rope_scaling: vLLM does not pass YaRN on to a language model inside thinker_config")
    other = {str(own[key]) for key in ("rope_type", "type") if own.get(key)} - {"default", "mrope", "yarn"}
    if other:
        raise UsageError(
            f"serve.rope_scaling: this model's rotary embedding is scaled already ({', '.join(sorted(other))}), which "
            "YaRN would undo",
            remedy="leave it out",
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        if key not in own and text.get(key) is not None:
            own[key] = text[key]
    if "rope_theta" not in own:
        own |= {key: value for key, value in _class_rotary(config).items() if key not in own}
    if not isinstance(own.get("rope_theta"), int | float):
        raise UsageError(
            "serve.rope_scaling: neither config.json nor transformers tells this model's rope_theta, and without it "
            "YaRN cannot be written"
        )
    return own


def _class_rotary(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = text_config(config)
    found: Mapping[str, Any] = _by_class(text if "model_type" in text else config).get("rope_parameters") or {}
    return found


def _check_yarn(scaling: RopeScaling, kind: str, positions: int | None, own: Mapping[str, Any]) -> None:
    """The original length must be the model's, and the scaled one longer than what the model has already."""
    asked, scaled = scaling.original_max_position_embeddings, _scaled(scaling)
    if positions is None:
        raise UsageError("serve.rope_scaling: nothing says how many positions the model has; YaRN cannot be checked")
    right = [_count(own, "original_max_position_embeddings") or positions]
    if right == [positions] and kind.startswith("qwen") and positions > 32768 and positions & (positions - 1):
        right = [32768, positions]  # Qwen's own advice: 40,960 is that and room for an answer, 128,000 is scaled
    if asked not in right:
        raise UsageError(
            f"serve.rope_scaling.original_max_position_embeddings: {asked:,} is not what this model was trained for; "
            f"it is {' or '.join(f'{number:,}' for number in right)}"
        )
    if scaled <= positions:
        raise UsageError(
            f"serve.rope_scaling: {scaling.factor:g} x {asked:,} is {scaled:,} positions, and the model has "
            f"{positions:,} without it",
            remedy="raise the factor, or leave it out",
        )
