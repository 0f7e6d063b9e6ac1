"""A checkpoint of the first decoder layers, for a smoke test."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.source import INDEX, Checkpoint, Tensor
from pipeline.errors import PipelineError
from pipeline.model.selection import Selection

LAYERS = 2
CHUNK = 64 << 20


def layers_to_keep(checkpoint: Checkpoint, selection: Selection) -> int:
    """The first layers that hold every kind there is: other tensors or shapes, another attention, `LAYERS` at least.

    A vision tower that feeds the first layers (Qwen3-VL's deepstack) needs as many layers as it feeds.
    """
    stack, count = selection.stack, selection.layers
    kinds: dict[int, set[Any]] = {index: set() for index in range(count)}
    for tensor in checkpoint.tensors.values():
        index = layer_of(tensor, selection)
        if 0 <= index < count:
            kinds[index].add((tensor.name.removeprefix(f"{stack}.{index}."), tensor.shape))
    types = text_config(checkpoint.config).get("layer_types") or []
    each = [(frozenset(kinds[index]), types[index] if index < len(types) else None) for index in range(count)]
    last_new = max(each.index(kind) for kind in each)
    vision = checkpoint.config.get("vision_config")
    fed = len(vision.get("deepstack_visual_indexes") or []) if isinstance(vision, dict) else 0
    return min(count, max(LAYERS, last_new + 1, fed))


def layer_of(tensor: Tensor, selection: Selection) -> int:
    """The decoder layer of a tensor, also beyond the last (multi-token prediction); -1 outside the stack."""
    prefix = f"{selection.stack}." if selection.stack else ""
    found = re.match(r"(\d+)\.", tensor.name.removeprefix(prefix)) if tensor.name.startswith(prefix) else None
    return int(found[1]) if found else -1


def truncate(checkpoint: Checkpoint, kept: list[Tensor], layers: int, target: Path) -> int:
    """Write a checkpoint of `kept` alone, with a config that says so many layers.

    Args:
        checkpoint: with its shards in place.
        kept: tensors of it.
        layers: decoder layers among them.
        target: a new directory.

    Returns:
        The bytes that were copied.
    """
    target.mkdir(parents=True)
    for name in checkpoint.sidecars:
        if name != "config.json":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.root / name, target / name)
    (target / "config.json").write_text(json.dumps(truncated_config(checkpoint.config, layers), indent=2) + "\n")
    weight_map, copied = {}, 0
    for index, shard in enumerate(checkpoint.shards):
        tensors = [tensor for tensor in kept if tensor.shard == index]
        if not tensors:
            continue
        assert shard.path is not None
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            weight_map[tensor.name] = shard.name
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (target / shard.name).open("wb", buffering=0) as out, shard.path.open("rb") as source:
            out.write(len(text).to_bytes(8, "little") + text)
            for begin, count in _runs(tensors):
                _copy(source.fileno(), out.fileno(), begin, count)
        copied += position
    if len(set(weight_map.values())) > 1 or not (target / "model.safetensors").exists():
        (target / INDEX).write_text(json.dumps({"metadata": {"total_size": copied}, "weight_map": weight_map}))
    return copied


def _runs(tensors: list[Tensor]) -> Iterator[tuple[int, int]]:
    """Neighbouring tensors as one range of the file: begin and length."""
    begin = end = tensors[0].offset
    for tensor in tensors:
        if tensor.offset != end:
            yield begin, end - begin
            begin = tensor.offset
        end = tensor.offset + tensor.nbytes
    yield begin, end - begin


def _copy(source: int, target: int, begin: int, count: int) -> None:
    """Within the kernel where the system can; a file system that shares blocks then copies nothing."""
    while count:
        size = min(CHUNK, count)
        try:
            done = os.copy_file_range(source, target, size, offset_src=begin)
        except (AttributeError, OSError):
            done = os.write(target, os.pread(source, size, begin))
        if done == 0:
            raise PipelineError("the source became shorter while it was read", remedy="start again")
        begin, count = begin + done, count - done


def truncated_config(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config with so many decoder layers: the count, and every list that has an entry per layer."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    text: Any = text_config(made)
    before = text.get("num_hidden_layers")
    text["num_hidden_layers"] = layers
    for key, value in text.items():
        if isinstance(value, list) and len(value) == before:
            text[key] = value[:layers]
        elif key in ("mlp_only_layers", "no_rope_layers_indices", "full_attention_idxs") and isinstance(value, list):
            text[key] = [index for index in value if index < layers]
    if isinstance(text.get("max_window_layers"), int):
        text["max_window_layers"] = min(text["max_window_layers"], layers)
    return made
