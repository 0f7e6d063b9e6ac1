"""Damage done to a checkpoint in one shard with an index, and to its config."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import read_shard, write_shard

SHARD = "model.safetensors"


def edit_config(out: Path, change: Callable[[Any], Any]) -> None:
    path = out / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def section(out: Path, **values: Any) -> None:
    edit_config(out, lambda config: config["quantization_config"].update(values))


def rewrite(out: Path, change: Callable[[dict[str, tuple[dict[str, Any], bytes]]], None]) -> None:
    """Change tensors as (entry, bytes) by name, and lay the shard and the index out anew."""
    header, data = read_shard(out / SHARD)
    header.pop("__metadata__", None)
    tensors = {name: (entry, data[slice(*entry["data_offsets"])]) for name, entry in header.items()}
    change(tensors)
    fresh, body = {}, b""
    for name, (entry, raw) in tensors.items():
        fresh[name] = {**entry, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    write_shard(out / SHARD, fresh, body)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(fresh, SHARD)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))


def drop(name: str) -> Callable[[Path], None]:
    return lambda out: rewrite(out, lambda tensors: tensors.pop(name))


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda out: rewrite(out, lambda tensors: tensors.update({new: tensors.pop(old)}))


def reshape(name: str, shape: list[int]) -> Callable[[Path], None]:
    return lambda out: rewrite(out, lambda t: t.update({name: ({**t[name][0], "shape": shape}, t[name][1])}))


def flip_a_bit(name: str) -> Callable[[Path], None]:
    def change(tensors: Any) -> None:
        entry, raw = tensors[name]
        tensors[name] = (entry, bytes([raw[0] ^ 1]) + raw[1:])

    return lambda out: rewrite(out, change)


def put(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: Any) -> None:
        entry, _ = tensors[name]
        raw = struct.pack("<f", value)
        tensors[name] = (entry, raw if entry["dtype"] == "F32" else raw[2:])

    return lambda out: rewrite(out, change)


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        for each in changes:
            each(out)

    return change


def tie_head(source: Path, head: str = "lm_head.weight", embedding: str = "model.embed_tokens.weight") -> Path:
    """Give a head the bytes of its embedding, as shards of a tied model that hold both have them."""
    files = {path: read_shard(path) for path in source.glob("*.safetensors")}
    (values,) = (data[slice(*h[embedding]["data_offsets"])] for h, data in files.values() if embedding in h)
    for path, (header, data) in files.items():
        if head in header:
            begin, end = header[head]["data_offsets"]
            write_shard(path, header, data[:begin] + values + data[end:])
    return source


def all_of(suffixes: tuple[str, ...]) -> Callable[[Path], None]:
    def change(tensors: Any) -> None:
        for name in [n for n in tensors if n.endswith(suffixes)]:
            tensors.pop(name)

    return lambda out: rewrite(out, change)
