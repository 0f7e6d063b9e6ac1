"""What a token and a sequence take of the KV cache: as vLLM counts them, for every kind of attention."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.recipe.sections import Serve
from pipeline.serving import profile
from pipeline.vllm_env import environment as servers
from tests.shapes import SHAPES, TEXT, VISION, made


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
    cache = profile.fit(Serve(gpu_memory="40GB"), config, 10**9, True).cache
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
        cache = profile.fit(Serve(gpu_memory=gpu), SHAPES["gemma3_27b"], 10**9, True).cache
        kept = 1024 - 1 + 2 * step
        assert cache.kept == kept
        assert cache.sequence(65536) == page * (10 * 4096 + 60 * (-(-kept // 16) + 1))
        assert cache.sequence(512) == page * (10 * 32 + 60 * 33)
    room = cache.sequence(65536)
    assert cache.longest(room, 131072) == 65536 and cache.longest(room - 1, 131072) == 65520
    serve = Serve(extra={"max-num-batched-tokens": 512})
    assert profile.fit(serve, SHAPES["gemma3_27b"], 10**9, True).cache.kept == 1023 + 1024
    serve = Serve(extra={"disable-hybrid-kv-cache-manager": True})
    assert profile.fit(serve, SHAPES["gemma3_27b"], 10**9, True).cache.sequence(1600) == 1600 * 62 * 16 * 256
    mistral = {**TEXT, "sliding_window": 4096, "model_type": "mistral"}
    cache = profile.fit(Serve(), mistral, 10**9, True).cache
    assert (cache.full, cache.sliding) == (0, 36)
    assert profile.fit(Serve(), {**mistral, "use_sliding_window": False}, 10**9, True).cache.full == 36
    remote = {**mistral, "model_type": "of its own", "sliding_window_pattern": 6}
    cache = profile.fit(Serve(), remote, 10**9, True).cache
    assert (cache.full, cache.sliding) == (6, 30)


def test_a_step_is_as_long_as_vllm_makes_it() -> None:
    """vLLM 0.32.0 was seen to take 4,096 tokens a step in throughput mode where 2,048 are its default."""

    def kept(serve: dict[str, Any]) -> int:
        found = profile.fit(Serve(gpu_memory="40GB", **serve), SHAPES["gemma3_27b"], 10**9, True)
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
def test_vllm_counts_the_same_cache(tmp_path: Path, server: servers.VllmEnvironment) -> None:
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


def test_the_cache_that_an_h200_was_seen_to_have() -> None:
    """Qwen2.5-VL-3B's shape, vLLM 0.24.0: 3,440,272 tokens in BF16 and 7,026,976 in FP8; see docs/serving.md."""
    config = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    serve = Serve(gpu_memory="150.1GB")
    for weights, fp8, seen in ((7_510_000_000, False, 3_440_272), (4_740_000_000, True, 7_026_976)):
        found = profile.fit(serve, config, weights, fp8)
        assert found.room is not None and 0.98 * seen < found.room / found.cache.per_token < 1.01 * seen
