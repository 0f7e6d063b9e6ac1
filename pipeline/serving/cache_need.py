"""What vLLM itself says that the KV cache of a serve config takes, against the GPU that the config was written for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.serving.profile import OVERHEAD, cache_room, stated_memory
from pipeline.units import size_text


@dataclass(frozen=True)
class CacheNeed:
    """The installed vLLM's own figure, a GPU.

    Attributes:
        bytes_per_token: of a token that all layers keep.
        bytes_per_sequence: of one sequence of `max_model_len` tokens.
        max_model_len: tokens.
        gpus: that share the model.
        gpu_memory: of the GPU that the config was written for, as the recipe says it; None where it says none.
        gpu_memory_utilization: vLLM's share of that.
        room: bytes for the cache, beside the weights and vLLM's own; None without `gpu_memory`.
    """

    bytes_per_token: int
    bytes_per_sequence: int
    max_model_len: int
    gpus: int
    gpu_memory: str | None
    gpu_memory_utilization: float
    room: int | None

    @property
    def sequences(self) -> float | None:
        """Sequences of full length that fit at once; None without `gpu_memory`."""
        return None if self.room is None else max(0.0, self.room / self.bytes_per_sequence)

    @property
    def sentence(self) -> str:
        """What is needed, for a reader; it begins with a verb."""
        each = f" on each of {self.gpus} GPUs" if self.gpus > 1 else ""
        cache = size_text(self.bytes_per_sequence)
        return f"needs {cache} of cache{each} for one sequence of {self.max_model_len:,} tokens"

    @property
    def share(self) -> str:
        """What vLLM may take of the GPU."""
        return f"{self.gpu_memory} x {self.gpu_memory_utilization:g}"

    @property
    def problem(self) -> str | None:
        """Why the GPU cannot hold one sequence; None where it can, or none was stated."""
        if self.room is None or self.bytes_per_sequence <= self.room:
            return None
        return (
            f"{self.sentence}, and {size_text(max(0, self.room))} of {self.share} are left beside the weights and "
            f"{size_text(OVERHEAD)} for vLLM"
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "sequences": self.sequences}


def cache_need(answer: Mapping[str, Any], text: str, weights: int) -> CacheNeed | None:
    """What a vLLM said of the cache of a serve config; None where it did not say.

    Args:
        answer: of `vllm_env.jobs.arguments.check`.
        text: of the serve config.
        weights: bytes of the checkpoint.
    """
    cache, parsed = answer.get("cache"), answer.get("parsed")
    if not cache or not parsed:
        return None
    gpus, share, memory = parsed["tensor_parallel_size"], parsed["gpu_memory_utilization"], stated_memory(text)
    try:
        room = None if memory is None else cache_room(memory, share, -(-weights // gpus))
    except ValueError:  # a head that somebody else wrote
        memory = room = None
    return CacheNeed(
        cache["bytes_per_token"], cache["bytes_per_sequence"], cache["max_model_len"], gpus, memory, share, room
    )
