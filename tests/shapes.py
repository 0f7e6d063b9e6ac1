"""What config.json says of models that the hub has, as far as it bears on serving; and a profile of one."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline.recipe import recipe
from pipeline.serving import profile

# Qwen3-8B's and Qwen3-VL-32B's public numbers
TEXT = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6, "model_type": "qwen3"}  # fmt: skip
VISION = {"text_config": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64,
                          "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                              "mrope_interleaved": True}},
          "vision_config": {"num_heads": 16}, "video_token_id": 3}  # fmt: skip
# What the hub's config.json of each says, as far as it bears on the cache
GEMMA = {"model_type": "gemma3_text", "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 5e5,
              "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
              "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 8192}},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
                   "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                   "max_position_embeddings": 128000, "sliding_window": 32768, "use_sliding_window": False,
                   "max_window_layers": 28, "rope_theta": 1e6, "torch_dtype": "bfloat16",
                   "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
                   "vision_config": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": 3584}},
    "qwen3_vl": {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
                 "text_config": {**VISION["text_config"], "model_type": "qwen3_vl_text", "dtype": "bfloat16"},
                 "vision_config": {"model_type": "qwen3_vl", "depth": 27, "num_heads": 16, "out_hidden_size": 5120}},
    "qwen3_moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048,
                  "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                  "max_position_embeddings": 40960, "rope_theta": 1e6, "num_experts": 128, "torch_dtype": "bfloat16",
                  "sliding_window": None, "use_sliding_window": False},
    "gemma3_4b": {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
                  "torch_dtype": "bfloat16",
                  "text_config": {**GEMMA, "hidden_size": 2560, "num_hidden_layers": 34},
                  "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "gemma3_27b": {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
                   "torch_dtype": "bfloat16",
                   "text_config": {**GEMMA, "hidden_size": 5376, "num_hidden_layers": 62, "num_attention_heads": 32,
                                   "num_key_value_heads": 16, "head_dim": 128},
                   "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "gemma3_1b": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152,
                  "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                  "max_position_embeddings": 32768, "rope_local_base_freq": 10000, "rope_theta": 1e6,
                  "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16"},
    "llava": {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "torch_dtype": "float16",
              "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "torch_dtype": "float16"},
              "vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 16}},
    "deepseek_v2_lite": {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048,
                         "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
                         "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                         "v_head_dim": 128, "max_position_embeddings": 163840, "rope_theta": 10000,
                         "torch_dtype": "bfloat16",
                         "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}},
}  # fmt: skip


def made(config: dict[str, Any], serve: str = "{}", weights: int = 10 * 10**9, kv_cache: str = "fp8") -> dict[str, Any]:
    text = (
        f"model: {{source: x}}\noutput: /nvme/name\nbackend: modelopt\nscheme: fp8\nkv_cache: {kv_cache}\n"
        f"calibration: {{}}\nserve: {serve}\n"
    )
    written = profile.write(recipe.parse(text), config, weights)
    assert written.startswith("#   vllm serve name --config name/quantize/serve.yaml\n")
    found: dict[str, Any] = yaml.safe_load(written)
    return found | {"comments": written.partition("served-model-name")[0]}
