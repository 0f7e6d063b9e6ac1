#!/usr/bin/env python3
"""Make the demo's model: a small Qwen3-VL with vision tower, merger, tokenizer and processor.

    python scripts/make_demo_model.py out/demo-model

The structure, the names and the files are those of a real checkpoint. The language model learns the few
sentences below in some seconds, so that a damaged copy would show; the vision tower is random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SENTENCES = (
    "A small red boat waits at the wooden pier.",
    "Two children fly a kite over the wet sand.",
    "The baker sets warm loaves on a long shelf.",
    "An old bicycle leans against a yellow wall.",
    "A grey cat sleeps on top of the piano.",
    "Rain runs down the window of the night train.",
    "The mechanic wipes her hands with a blue cloth.",
    "Snow covers the benches around the frozen pond.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip


def make_tokenizer(target: Path) -> dict[str, int]:
    """Write a byte-level BPE tokenizer and return its special tokens' ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=504, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "processor_class": "Qwen3VLProcessor", "errors": "replace",
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 2048,
        "extra_special_tokens": list(SPECIAL[1:]),
    }  # fmt: skip
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {token: tokenizer.token_to_id(token) for token in SPECIAL}


def make_model(target: Path, ids: dict[str, int]) -> None:
    """Write config and weights."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5],
                            "mrope_interleaved": True},
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 256,
        "deepstack_visual_indexes": [1, 2], "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(20)
    model = Qwen3VLForConditionalGeneration(config)
    learn(model, target)
    model.to(torch.bfloat16).save_pretrained(target, max_shard_size="4MB")
    image = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor", "patch_size": 16,
        "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 1024, "max_pixels": 65536,
        "size": {"shortest_edge": 1024, "longest_edge": 65536},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255, "resample": 3,
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    }  # fmt: skip
    (target / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")


def learn(model: Any, target: Path, steps: int = 120) -> None:
    """Teach the language model the sentences by heart."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    batch = tokenizer([f"{s}<|im_end|>" for s in SENTENCES], return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss on the sentences after {steps} steps: {loss.item():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    target = parser.parse_args().directory
    target.mkdir(parents=True, exist_ok=True)
    ids = make_tokenizer(target)
    make_model(target, ids)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    print(f"{target}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
