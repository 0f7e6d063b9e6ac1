"""The serving profile: quantize/serve.yaml, for ``vllm serve DIR --config DIR/quantize/serve.yaml``.

What the recipe's ``serve`` says, and for the rest what the checkpoint implies. Names are those of vLLM's arguments;
`in_vllm.arguments` holds a profile against the vLLM that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import UsageError
from pipeline.model.selection import text_config
from pipeline.recipe import Serve, parse_size

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

FILE = "quantize/serve.yaml"
LONGEST = 32768  # tokens of context that a profile asks for by itself; more costs memory that few requests use
# Beside weights and cache on each GPU: CUDA's context, graphs and the activations of the longest prefill.
# On an H200 with vLLM 0.24.0 and 8192 tokens a prefill it was measured below this for a 3B model; see docs/serving.md.
OVERHEAD = 4 << 30


@dataclass(frozen=True)
class Fit:
    """What one GPU holds, in bytes, and the tokens of KV cache that fit.

    Attributes:
        weights: of the checkpoint, divided over the GPUs.
        per_token: of cache on one GPU.
        room: for the cache, after weights and overhead; negative where not even those fit. None: no GPU was stated.
        tokens: in that room.
    """

    weights: int
    per_token: int
    room: int | None
    tokens: int | None


def cache_bytes_per_token(config: Mapping[str, Any], width: int, parallel: int = 1) -> int:
    """Bytes of KV cache that a token takes on one GPU, over all layers.

    Keys and values, ``num_key_value_heads * head_dim`` of each a layer; heads are divided over GPUs and repeated where
    there are fewer heads than GPUs. Layers with a sliding window count in full.

    Args:
        config: the checkpoint's.
        width: bytes a value: 1 in FP8, 2 in BF16.
        parallel: GPUs that share the model.
    """
    text = text_config(config)
    heads = int(text.get("num_attention_heads") or 1)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head = int(text.get("head_dim") or int(text.get("hidden_size") or 0) // heads)
    return 2 * int(text.get("num_hidden_layers") or 0) * max(1, -(-kv_heads // parallel)) * head * width


def cache_dtype(serve: Serve, fp8_cache: bool) -> str:
    """The --kv-cache-dtype that the profile will say.

    Raises:
        UsageError: FP8 without scales in the checkpoint; vLLM would run it at scale 1.0.
    """
    asked = str(serve.extra.get("kv-cache-dtype") or serve.kv_cache_dtype or ("fp8" if fp8_cache else "auto"))
    if asked.startswith("fp8") and not fp8_cache:
        raise UsageError(
            f"serve.kv_cache_dtype: {asked} with kv_cache: none would run the attention at KV scale 1.0; choose "
            "kv_cache: fp8, or leave it out"
        )
    return asked


def fit(serve: Serve, config: Mapping[str, Any], weights: int, fp8_cache: bool) -> Fit:
    """What `serve`'s GPU would hold; see `Fit`."""
    parallel = serve.tensor_parallel_size
    share = -(-weights // parallel)
    kind = cache_dtype(serve, fp8_cache)
    narrow = kind.startswith("fp8") or (kind == "auto" and fp8_cache)
    per_token = cache_bytes_per_token(config, 1 if narrow else 2, parallel)
    if serve.gpu_memory is None:
        return Fit(share, per_token, None, None)
    room = int(parse_size(serve.gpu_memory) * serve.gpu_memory_utilization) - share - OVERHEAD
    return Fit(share, per_token, room, max(0, room) // per_token if per_token else None)


def arguments(serve: Serve, config: Mapping[str, Any], name: str, weights: int, fp8_cache: bool) -> dict[str, Any]:
    """vLLM's arguments, by name.

    Args:
        serve: the recipe's section.
        config: the checkpoint's config.
        name: served under, where the recipe gives none.
        weights: bytes of the result.
        fp8_cache: whether the checkpoint holds KV scales.

    Raises:
        UsageError: the stated GPU cannot hold it, or the context is longer than the model's.
    """
    limit = _limit(serve, config)
    room = fit(serve, config, weights, fp8_cache)
    longest = LONGEST if serve.rope_scaling is None else limit or LONGEST
    length = serve.max_model_len or min(limit or LONGEST, longest)
    heads = text_config(config).get("num_attention_heads")
    if isinstance(heads, int) and heads % serve.tensor_parallel_size:
        raise UsageError(
            f"serve.tensor_parallel_size: {heads} attention heads cannot be divided over {serve.tensor_parallel_size} "
            "GPUs; vLLM refuses that"
        )
    if limit is not None and length > limit:
        raise UsageError(
            f"serve.max_model_len: {length:,} tokens, the model has {limit:,} positions; lower it, or state "
            "serve.rope_scaling (YaRN) if the model was made for it"
        )
    if room.room is not None and room.tokens is not None:
        parallel = f" on each of {serve.tensor_parallel_size} GPUs" if serve.tensor_parallel_size > 1 else ""
        stated = f"{serve.gpu_memory} x {serve.gpu_memory_utilization:g}"
        if room.room <= 0:
            raise UsageError(
                f"serve.gpu_memory: {room.weights / 1e9:.1f} GB of weights{parallel} and {OVERHEAD / 1e9:.1f} GB for "
                f"vLLM do not fit into {stated}; raise serve.tensor_parallel_size or serve.gpu_memory_utilization"
            )
        if serve.max_model_len is None and room.tokens < length:
            length = max(1024, room.tokens // 1024 * 1024)
        if room.tokens < length:
            raise UsageError(
                f"serve.max_model_len: one sequence of {length:,} tokens takes {length * room.per_token / 1e9:.1f} GB "
                f"of cache, {room.room / 1e9:.1f} GB of {stated} are left beside the weights{parallel}: at most "
                f"{room.tokens:,} tokens"
            )
    made: dict[str, Any] = {
        "served-model-name": serve.served_model_name or name,
        "kv-cache-dtype": cache_dtype(serve, fp8_cache),
        **({"max-model-len": length} if limit is not None or serve.max_model_len is not None else {}),
        "gpu-memory-utilization": serve.gpu_memory_utilization,
        "tensor-parallel-size": serve.tensor_parallel_size,
    }
    if serve.max_num_seqs is not None:
        made["max-num-seqs"] = serve.max_num_seqs
    if "vision_config" in config:
        made["limit-mm-per-prompt"] = serve.limit_mm_per_prompt or _limits(config)
    if serve.rope_scaling is not None:
        made["hf-overrides"] = _yarn(serve, config)
    return made | serve.extra


def _limits(config: Mapping[str, Any]) -> dict[str, int]:
    limits = {"image": 4}
    if "video_token_id" in config or "video_token_index" in config:
        limits["video"] = 0
    return limits


def _limit(serve: Serve, config: Mapping[str, Any]) -> int | None:
    """Positions that the model has; None where its config does not say, and the server has a default of its own."""
    if serve.rope_scaling is not None:
        return int(serve.rope_scaling.factor * serve.rope_scaling.original_max_position_embeddings)
    limit = text_config(config).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def _yarn(serve: Serve, config: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN as a config override: transformers 5's ``rope_parameters``, and the scaled number of positions.

    vLLM 0.32.0 takes ``max_position_embeddings`` to be scaled already. What the model's own rotary embedding says
    (theta, the sections of a multimodal one) stays.
    """
    assert serve.rope_scaling is not None
    text = text_config(config)
    if any(isinstance(value, dict) for value in (text.get("rope_parameters") or {}).values()):
        raise UsageError(
            "serve.rope_scaling: this model has rotary parameters of its own for each kind of attention; YaRN is not "
            "written for it"
        )
    own = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 1e4), **(text.get("rope_scaling") or {})}
    override = {
        "rope_parameters": {
            **{key: value for key, value in own.items() if key not in ("type", "rope_type")},
            "rope_type": "yarn",
            "factor": serve.rope_scaling.factor,
            "original_max_position_embeddings": serve.rope_scaling.original_max_position_embeddings,
        },
        "max_position_embeddings": _limit(serve, config),
    }
    return {"text_config": override} if "vision_config" in config else override


def write(recipe: Recipe, config: Mapping[str, Any], weights: int) -> str:
    """The profile as YAML, with the launch line and the memory it counts on as comments.

    Raises:
        UsageError: see `arguments`.
    """
    fp8_cache = recipe.kv_cache == "fp8"
    name = Path(recipe.output).name
    made = arguments(recipe.serve, config, name, weights, fp8_cache)
    found = fit(recipe.serve, config, weights, fp8_cache)
    narrow = made["kv-cache-dtype"].startswith("fp8") or (made["kv-cache-dtype"] == "auto" and fp8_cache)
    each = f" on each of {recipe.serve.tensor_parallel_size} GPUs" if recipe.serve.tensor_parallel_size > 1 else ""
    lines = [
        f"#   vllm serve {name} --config {name}/{FILE}",
        "#",
        f"# Weights take {found.weights / 1e9:.1f} GB{each}; a token of {'FP8' if narrow else 'BF16'} cache "
        f"{found.per_token / 1e3:.0f} kB.",
    ]
    length = made.get("max-model-len")
    if length is not None:
        lines[-1] = lines[-1][:-1] + f", a sequence of {length:,} tokens {length * found.per_token / 1e9:.1f} GB."
    if length is not None and found.tokens is not None:
        lines.append(
            f"# In {recipe.serve.gpu_memory} there is room for about {found.tokens:,} tokens of cache: "
            f"{found.tokens / length:.1f} sequences of full length."
        )
    return "\n".join([*lines, ""]) + yaml.safe_dump(made, sort_keys=False)
