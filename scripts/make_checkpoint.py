#!/usr/bin/env python3
"""Make a checkpoint of a real model's shape with random weights, for plans, benchmarks and tests.

    python scripts/make_checkpoint.py qwen2_5_vl_3b DIR [--layers 12] [--sparse] [--shard-size 2GB]

Tensor names and shapes are those on the hub: the transformers class is built on the meta device and its
names are taken through transformers' own conversion mapping. --sparse writes headers and holes only, so
that a 64 GB checkpoint costs no disk: enough for `quantize plan`. The numbers below are the public
config.json files of these models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.units import parse_size

_QWEN2_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
_QWEN3_ROPE = {
    "rope_type": "default",
    "rope_theta": 5_000_000,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
}


def _qwen3_vl_vision(depth: int, hidden: int, wide: int, out: int, deepstack: list[int]) -> dict[str, Any]:
    return {"depth": depth, "hidden_size": hidden, "intermediate_size": wide, "num_heads": 16, "out_hidden_size": out,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": deepstack, "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip


def _text(hidden: int, layers: int, wide: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": wide, "num_attention_heads": heads,
            "num_key_value_heads": kv, "vocab_size": vocabulary, **more}  # fmt: skip


def _qwen2_5_vl(tie: bool, text: dict[str, Any]) -> dict[str, Any]:
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
              "out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112,
              "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu"}  # fmt: skip
    return {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
            "tie_word_embeddings": tie,
            "text_config": {**text, "max_position_embeddings": 128000, "rope_parameters": _QWEN2_ROPE,
                            "tie_word_embeddings": tie},
            "vision_config": vision}  # fmt: skip


def _qwen3_vl(tie: bool, text: dict[str, Any], vision: dict[str, Any], moe: bool = False) -> dict[str, Any]:
    name = "Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"
    return {"architectures": [name], "model_type": "qwen3_vl_moe" if moe else "qwen3_vl", "tie_word_embeddings": tie,
            "text_config": {**text, "head_dim": 128, "max_position_embeddings": 262144, "rope_parameters": _QWEN3_ROPE,
                            "tie_word_embeddings": tie},
            "vision_config": vision}  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_3b": _qwen2_5_vl(True, _text(2048, 36, 11008, 16, 2, 151936)),
    "qwen2_5_vl_7b": _qwen2_5_vl(False, _text(3584, 28, 18944, 28, 4, 152064)),
    "qwen3_vl_4b": _qwen3_vl(
        True, _text(2560, 36, 9728, 32, 8, 151936), _qwen3_vl_vision(24, 1024, 4096, 2560, [5, 11, 17])
    ),
    "qwen3_vl_8b": _qwen3_vl(
        False, _text(4096, 36, 12288, 32, 8, 151936), _qwen3_vl_vision(27, 1152, 4304, 4096, [8, 16, 24])
    ),
    "qwen3_vl_32b": _qwen3_vl(
        False, _text(5120, 64, 25600, 64, 8, 151936), _qwen3_vl_vision(27, 1152, 4304, 5120, [8, 16, 24])
    ),
    "qwen3_vl_30b_a3b": _qwen3_vl(
        False,
        _text(2048, 48, 6144, 32, 4, 151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
              decoder_sparse_step=1, mlp_only_layers=[]),
        _qwen3_vl_vision(27, 1152, 4304, 2048, [8, 16, 24]),
        moe=True,
    ),
    "qwen3_1_7b": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True,
                   **_text(2048, 28, 6144, 16, 8, 151936, head_dim=128, max_position_embeddings=40960)},
    "qwen3_8b": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False,
                 **_text(4096, 36, 12288, 32, 8, 151936, head_dim=128, max_position_embeddings=40960)},
    "llama_3_1_8b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False,
                     **_text(4096, 32, 14336, 32, 8, 128256, max_position_embeddings=131072)},
    "llama_3_2_1b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True,
                     **_text(2048, 16, 8192, 32, 8, 128256, head_dim=64, max_position_embeddings=131072)},
}  # fmt: skip


def hub_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes on the hub of a model with this config."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    values = {key: value for key, value in config.items() if key != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **values)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(made, dtype=torch.bfloat16)
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    tied = set(model.all_tied_weights_keys)
    shapes = {}
    for name, tensor in tensors.items():
        if name in tied:
            continue
        shape = tuple(tensor.shape)
        if config["model_type"] == "qwen3_vl_moe" and ".experts." in name:  # the hub's is [experts, in, out]
            shape = (shape[0], shape[2], shape[1])
        shapes[name] = shape
    return shapes


def write(config: dict[str, Any], target: Path, shard_size: int, sparse: bool, seed: int) -> None:
    """Write config, shards and index."""
    target.mkdir(parents=True)
    stored = {**config, "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    bins: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in hub_shapes(config).items():
        nbytes = 2 * _count(shape)
        if bins[-1] and filled + nbytes > shard_size:
            bins.append({})
            filled = 0
        bins[-1][name] = shape
        filled += nbytes
    noise = None if sparse else _Noise(seed)
    weight_map = {}
    for index, tensors in enumerate(bins):
        file = "model.safetensors" if len(bins) == 1 else f"model-{index + 1:05d}-of-{len(bins):05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, file))
        _write_shard(target / file, tensors, noise)
    if len(bins) > 1:
        total = sum(2 * _count(shape) for tensors in bins for shape in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


class _Noise:
    """BF16 normal values of standard deviation 0.02, cheap enough for gigabytes: one block, entered anywhere."""

    def __init__(self, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(1 << 25, generator=generator).mul_(0.02).bfloat16()
        self._block = values.view(torch.uint8).numpy().tobytes()
        self._position = 0

    def take(self, nbytes: int) -> list[memoryview]:
        parts = []
        while nbytes:
            self._position = (self._position + 7919 * 2) % (len(self._block) - 2)
            part = memoryview(self._block)[self._position : self._position + nbytes]
            parts.append(part)
            nbytes -= len(part)
        return parts


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], noise: _Noise | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + 2 * _count(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if noise is None:
            file.truncate(8 + len(text) + position)
            return
        for shape in tensors.values():
            for part in noise.take(2 * _count(shape)):
                file.write(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers instead of the real number")
    parser.add_argument("--sparse", action="store_true", help="headers and holes only")
    parser.add_argument("--shard-size", default="5GB")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = json.loads(json.dumps(SHAPES[options.shape]))
    if options.layers:
        config.get("text_config", config)["num_hidden_layers"] = options.layers
    write(config, options.directory, parse_size(options.shard_size), options.sparse, options.seed)
    size = sum(path.stat().st_size for path in options.directory.glob("*.safetensors"))
    print(f"{options.directory}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
