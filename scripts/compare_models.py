#!/usr/bin/env python3
"""Load a checkpoint and its source in transformers and compare what they say next.

    python scripts/compare_models.py CHECKPOINT SOURCE ["a prompt" ...]

Prints, over all positions of the prompts, the Kullback-Leibler divergence KL(source || checkpoint) in nats
and how often both choose the same next token, and a greedy continuation of each. FP8 weights are dequantized
first, so this shows the weights, not a server's kernels. Where the checkpoint has KV scales, keys and values
are rounded to FP8 with them as well, and for comparison with the scale 1.0 of a checkpoint that has none.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

PROMPTS = ("A small red boat waits at the", "Two children fly a kite over", "An old bicycle leans against a")


def read(path: Path) -> dict:
    from safetensors.torch import load_file

    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def dequantized(path: Path, target: Path) -> tuple[Path, dict[int, dict[str, float]]]:
    """The checkpoint with BF16 weights, and its KV scales by layer."""
    import re

    import torch
    from safetensors.torch import save_file

    tensors, plain, scales = read(path), {}, {}
    for name, value in tensors.items():
        if found := re.search(r"\.layers\.(\d+)\..*?([kvq])_scale$", name):
            scales.setdefault(int(found[1]), {})[found[2]] = float(value)
        elif value.dtype == torch.float8_e4m3fn:
            plain[name] = (value.float() * tensors[f"{name}_scale"].float()).to(torch.bfloat16)
        elif not name.endswith("_scale"):
            plain[name] = value
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target, scales


def load(path: str | Path):
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path, dtype=torch.bfloat16)
    return model.eval()


def quantize_cache(model, scales: dict[int, dict[str, float]]) -> None:
    """Round keys and values to E4M3 with these scales before attention sees them."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def rounded(states, scale):
        codes = (states.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (codes.float() * scale).to(states.dtype)

    def attention(module, query, key, value, *args, **kwargs):
        layer = scales[module.layer_idx] if hasattr(module, "layer_idx") else None
        if layer:
            key, value = rounded(key, layer["k"]), rounded(value, layer["v"])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *args, **kwargs)

    AttentionInterface.register("fp8_cache", attention)
    AttentionMaskInterface.register("fp8_cache", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("fp8_cache")


def compare(source, checkpoint, tokenizer, prompts: list[str], what: str) -> None:
    import torch

    divergence = agree = positions = 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        p, q = (torch.log_softmax(m(input_ids=ids).logits.float(), -1)[0] for m in (source, checkpoint))
        if not bool(q.isfinite().all()):
            sys.exit("the checkpoint's logits are not finite")
        divergence += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += p.shape[0]
    divergence, agree = divergence / positions, agree / positions
    print(f"{what}: KL(source || checkpoint) {divergence:.2e} nats, same next token {agree:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("source")
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.source)
    source = load(options.source)
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        path, scales = dequantized(options.checkpoint, Path(directory))
        checkpoint = load(path)
        compare(source, checkpoint, tokenizer, options.prompts, "FP8 weights")
        if scales:
            ones = {layer: dict.fromkeys(found, 1.0) for layer, found in scales.items()}
            quantize_cache(checkpoint, ones)
            compare(source, checkpoint, tokenizer, options.prompts, "and an FP8 KV cache at scale 1.0")
            quantize_cache(checkpoint, scales)
            compare(source, checkpoint, tokenizer, options.prompts, "and an FP8 KV cache at the checkpoint's scales")
        ids = tokenizer(options.prompts[0], return_tensors="pt").input_ids
        for name, model in (("source", source), ("checkpoint", checkpoint)):
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
            print(f"{name}: {tokenizer.decode(out[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
