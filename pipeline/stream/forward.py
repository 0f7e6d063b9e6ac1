"""Running token batches through a model, one decoder layer at a time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.plan.plan import Plan

if TYPE_CHECKING:
    from pipeline.model.skeleton import Layer


def count_expert_tokens(layer: Layer) -> Callable[[], dict[str, list[int]]]:
    """Count what a router sends to each expert; the function returned ends the counting."""
    import torch

    counts: dict[str, Any] = {}
    hooks = []
    for block in layer.experts:
        name, experts = f"{layer.prefix}.{block.path}", len(block.names)

        def look(_module: Any, args: Any, kwargs: Any, name: str = name, experts: int = experts) -> None:
            numbered = (torch.int64, torch.int32)
            chosen = next((v for v in (*args, *kwargs.values()) if getattr(v, "dtype", None) in numbered), None)
            if chosen is None:
                return
            numbers = torch.arange(experts, device=chosen.device)
            seen = (chosen.reshape(-1, 1) == numbers).sum(0)
            counts[name] = seen if name not in counts else counts[name] + seen

        hooks.append(block.module.register_forward_pre_hook(look, with_kwargs=True))

    def end() -> dict[str, list[int]]:
        for hook in hooks:
            hook.remove()
        return {name: value.tolist() for name, value in counts.items()}

    return end


def return_memory() -> None:
    """Give what the layer before left free back to the system, so that the heap's holes do not grow with the depth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


@contextmanager
def settings(plan: Plan) -> Iterator[None]:
    """The same bits every time: deterministic kernels, and on a CPU a fixed number of threads."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.set_num_threads(plan.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        deterministic.fill_uninitialized_memory = filled
