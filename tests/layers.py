"""A model's skeleton, whose layers are filled one at a time, and tokens to run through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import open_checkpoint
from pipeline.model.selection import select
from pipeline.model.skeleton import Skeleton

SEQUENCES = [[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8, 9, 3], [4] * 70]


def build(source: Path) -> tuple[Any, Any, Callable[[str], Any]]:
    import torch
    from safetensors import safe_open

    checkpoint = open_checkpoint(source)
    selection = select(checkpoint)
    skeleton = Skeleton.build(checkpoint, selection, torch.device("cpu"))
    files = [safe_open(str(shard.path), "pt") for shard in checkpoint.shards]
    return skeleton, selection, lambda name: files[checkpoint.tensors[name].shard].get_tensor(name)
