"""How much KV cache the installed vLLM takes for a serve config, by its own account: its layers, groups and blocks.

The model stands on the meta device and nothing is allocated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.vllm_env.jobs.load import alone, default_dtype, initialize

ROOM = 1 << 50  # bytes that vLLM is told to divide into blocks; more than any sequence takes
# one GPU's share of the cache is not counted with these
_DIVIDED = ("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size",
            "prefill_context_parallel_size")  # fmt: skip


def need(arguments: Any) -> dict[str, Any]:
    """The KV cache of one sequence of ``max_model_len`` tokens on one GPU.

    Args:
        arguments: vLLM's ``EngineArgs`` of the serve config; they are changed.

    Returns:
        ``bytes_per_sequence``; ``bytes_per_token``, over the layers that keep every token, and those with a window
        while it is not full; ``max_model_len``, in tokens; ``block``, the tokens of the largest block.

    Raises:
        NotImplementedError: the model has no such cache, or it is divided in a way that is not counted here.
        ImportError, AttributeError and others: this vLLM lacks what is asked for.
    """
    from vllm.config import set_current_vllm_config
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, get_max_concurrency_for_kv_cache_config

    if any(getattr(arguments, name, None) not in (None, 1) for name in _DIVIDED):
        raise NotImplementedError("a cache that is divided by more than tensor-parallel-size is not counted")
    if getattr(arguments, "speculative_config", None):
        raise NotImplementedError("the cache of a draft model is not counted")
    gpus, arguments.tensor_parallel_size = arguments.tensor_parallel_size, 1  # other ranks would be waited for
    arguments.enforce_eager = True
    arguments.kv_cache_memory_bytes = 64 << 20
    config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    config.cache_config.num_gpu_blocks_override = None
    with set_current_vllm_config(config):
        import torch

        alone()
        with default_dtype(config.model_config.dtype), torch.device("meta"):
            initialize(config)
        specs = {name: _share(spec, gpus) for name, spec in _specs(config).items()}
        if not specs:
            raise NotImplementedError("the model has no KV cache")
        (found,) = get_kv_cache_configs(config, [specs], [ROOM])
        sequences = get_max_concurrency_for_kv_cache_config(config, found)
    block = ROOM // found.num_blocks  # bytes over all layers that share it
    return {
        "bytes_per_sequence": round(found.num_blocks / sequences) * block,
        "bytes_per_token": sum(spec.page_size_bytes // spec.block_size for spec in specs.values()),
        "max_model_len": config.model_config.max_model_len,
        "block": max(spec.block_size for spec in specs.values()),
    }


def _specs(config: Any) -> dict[str, Any]:
    """By layer, what vLLM's worker reports of its cache, as its model runner does; and the layout that follows."""
    layers = {
        name: layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if hasattr(layer, "get_kv_cache_spec") and not getattr(layer, "kv_sharing_target_layer_name", None)
    }
    try:
        from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec
    except ImportError:
        specs = {name: spec for name, layer in layers.items() if (spec := layer.get_kv_cache_spec(config))}
    else:
        specs = get_kv_cache_spec(config)
    try:
        from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    except ImportError:  # before there was a choice
        return specs
    backends = [layer.get_attn_backend() for layer in layers.values() if hasattr(layer, "get_attn_backend")]
    names = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(config, [names], list(specs.values()))
    return specs


def _share(spec: Any, gpus: int) -> Any:
    """A layer's cache on one of `gpus`: vLLM divides the KV heads, and repeats them where there are fewer."""
    if gpus == 1:
        return spec
    if not hasattr(spec, "num_kv_heads"):
        raise NotImplementedError(f"the share that a GPU has of {type(spec).__name__} is not counted")
    return replace(spec, num_kv_heads=max(1, spec.num_kv_heads // gpus))
