"""A small model of every supported family, with random weights, saved as it looks on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
IMAGE = 260
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GEMMA_ROPE = {kind: {"rope_type": "default", "rope_theta": theta}
              for kind, theta in (("sliding_attention", 1e4), ("full_attention", 1e6))}  # fmt: skip
QWEN2_VISION = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
QWEN25_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                 "fullatt_block_indexes": [1]}  # fmt: skip
QWEN3_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}  # fmt: skip
# as deep and as wide as the language model, to tempt the search for its layers
CLIP = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
PIXTRAL = {**CLIP, "model_type": "pixtral", "head_dim": 16}
INTERN = {**CLIP, "model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"class": "LlamaForCausalLM", "config": TEXT},
    "llama_tied": {"class": "LlamaForCausalLM", "config": {**TEXT, "tie_word_embeddings": True}},
    "mistral": {"class": "MistralForCausalLM", "config": TEXT},
    "phi3": {"class": "Phi3ForCausalLM", "config": {k: v for k, v in TEXT.items() if k != "head_dim"}},
    "qwen2": {"class": "Qwen2ForCausalLM", "config": {k: v for k, v in TEXT.items() if k != "head_dim"}},
    "qwen3": {"class": "Qwen3ForCausalLM", "config": TEXT},
    "gemma3_text": {"class": "Gemma3ForCausalLM", "config": {
        **TEXT, "sliding_window": 64, "rope_parameters": GEMMA_ROPE}},
    "mixtral": {"class": "MixtralForCausalLM", "config": {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}},
    "qwen2_moe": {"class": "Qwen2MoeForCausalLM", "config": {
        **TEXT, **MOE, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [0]}},
    "qwen3_moe": {"class": "Qwen3MoeForCausalLM", "config": {
        **TEXT, **MOE, "decoder_sparse_step": 1, "mlp_only_layers": [1]}},
    "qwen2_vl": {"class": "Qwen2VLForConditionalGeneration", "config": {
        "text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN2_VISION}},
    "qwen2_5_vl": {"class": "Qwen2_5_VLForConditionalGeneration", "config": {
        "text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN25_VISION}},
    "qwen3_vl": {"class": "Qwen3VLForConditionalGeneration", "config": {
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": QWEN3_VISION}},
    "qwen3_vl_moe": {"class": "Qwen3VLMoeForConditionalGeneration", "config": {
        "text_config": {**TEXT, **MOE, "norm_topk_prob": True, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": QWEN3_VISION}},
    "gemma3": {"class": "Gemma3ForConditionalGeneration", "config": {
        "text_config": {**TEXT, "sliding_window": 64, "rope_parameters": GEMMA_ROPE},
        "vision_config": SIGLIP, "mm_tokens_per_image": 4}},
    "llava": {"class": "LlavaForConditionalGeneration", "config": {
        "text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP}},
    "mistral3": {"class": "Mistral3ForConditionalGeneration", "config": {
        "text_config": {**TEXT, "model_type": "mistral"}, "vision_config": PIXTRAL}},
    "internvl": {"class": "InternVLForConditionalGeneration", "config": {
        "text_config": {**TEXT, "model_type": "qwen2"}, "vision_config": INTERN}},
}  # fmt: skip


def build(name: str, device: str) -> Any:
    """The transformers model of a family, on ``cpu`` with random BF16 weights or on ``meta``."""
    import torch
    import transformers

    family = FAMILIES[name]
    model_class = getattr(transformers, family["class"])
    config = model_class.config_class(**json.loads(json.dumps(family["config"])))
    for key in ("image_token_id", "image_token_index"):
        if key in config.to_dict():
            setattr(config, key, IMAGE)
    config.architectures = [family["class"]]
    torch.manual_seed(11)
    with torch.device(device):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def add_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer: ids 4 to 259 are bytes; 0 to 3 pad, begin, end and turn, 260 an image."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<turn>", *alphabet, "<image>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<turn>", "<image>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>",
                "eos_token": "</s>", "model_max_length": 256, "chat_template": template}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save(name: str, directory: Path) -> Path:
    """Save a family's model in several shards, with the hub's names and, for fused experts, the hub's layout."""
    import torch
    from safetensors.torch import load_file, save_file

    model = build(name, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and not parameter.any():
                parameter.normal_(0, 0.02)  # biases are born zero
    model.save_pretrained(directory, max_shard_size="200KB")
    if name.startswith("gemma3"):  # transformers 5.14 adds flat keys here, which 5.17 refuses
        config = json.loads((directory / "config.json").read_text())
        config.get("text_config", config)["rope_parameters"] = GEMMA_ROPE
        (directory / "config.json").write_text(json.dumps(config, indent=2))
    if name == "qwen3_vl_moe":
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            for key in tensors:
                if key.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                    tensors[key] = tensors[key].transpose(1, 2).contiguous()
            save_file(tensors, path, metadata={"format": "pt"})
    add_tokenizer(directory)
    if hasattr(model.config, "vision_config"):
        (directory / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}\n')
    return directory
