"""What the KV cache takes of a token and a sequence: bounds, and vLLM's own figure, for every kind of attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import UsageError
from pipeline.recipe import recipe
from pipeline.recipe.sections import Serve
from pipeline.serving import profile
from pipeline.serving.cache_need import CacheNeed, cache_need
from pipeline.serving.profile_check import hold_against
from pipeline.verify.verify import verify
from pipeline.vllm_env.worker import VllmWorker
from tests.shapes import SHAPES, TEXT, VISION, made

RECIPE = "model: {{source: x}}\noutput: y\nbackend: modelopt\nscheme: fp8\ncalibration: {{}}\nserve: {serve}\n"


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


def test_layers_with_a_window_are_bounds() -> None:
    """Gemma 3 27B in FP8: 10 layers keep all, 52 a window at least; ten more by vLLM's groups."""
    layer = 16 * 256  # bytes of a token: KV heads, keys and values
    cache = profile.fit(Serve(gpu_memory="40GB"), SHAPES["gemma3_27b"], 10**9, True).cache
    assert (cache.layers, cache.full, cache.sliding, cache.window) == (62, 10, 52, 1024)
    assert cache.at_least(65536) == layer * (10 * 65536 + 52 * 1024)
    assert cache.at_least(512) == layer * 62 * 512
    assert cache.at_most(65536) == layer * (62 + 10) * (65536 + profile.BLOCK)
    mistral = {**TEXT, "sliding_window": 4096, "model_type": "mistral"}
    cache = profile.fit(Serve(), mistral, 10**9, True).cache
    assert (cache.layers, cache.full, cache.sliding) == (36, 0, 36)
    cache = profile.fit(Serve(), {**mistral, "use_sliding_window": False}, 10**9, True).cache
    assert (cache.full, cache.sliding) == (36, 0)
    remote = {**mistral, "model_type": "of its own", "sliding_window_pattern": 6}
    cache = profile.fit(Serve(), remote, 10**9, True).cache
    assert (cache.full, cache.sliding) == (6, 30)


@pytest.mark.parametrize(
    ("more", "full"),
    [
        ({"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 9}, 9),
        ({"layer_types": ["chunked_attention", "full_attention"] * 18}, 18),
        ({"layer_types": ["full_attention"] * 36, "num_kv_shared_layers": 10}, 26),
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, 9),
    ],
)
def test_what_may_keep_no_tokens_refuses_nothing(more: dict[str, Any], full: int) -> None:
    """Linear and chunked attention, and layers that use the cache of others, count for the upper bound alone."""
    cache = profile.fit(Serve(), {**TEXT, **more}, 10**9, True).cache
    assert (cache.layers, cache.full, cache.sliding) == (36, full, 0)
    assert cache.at_least(4096) == full * cache.layer * 4096 < cache.at_most(4096)


def test_a_length_is_chosen_by_what_is_needed_at_most_and_refused_by_what_is_needed_at_least() -> None:
    """Gemma 3 27B beside 27 GB of weights: there may be room for longer sequences than the chosen ones."""
    config, weights, gpu = SHAPES["gemma3_27b"], 27 * 10**9, "40GB"
    found = profile.fit(Serve(gpu_memory=gpu), config, weights, True)
    assert found.room is not None
    told = made(config, f"{{gpu_memory: {gpu}}}", weights)
    chosen = told["max-model-len"]
    assert found.cache.at_most(chosen) <= found.room < found.cache.at_most(chosen + 1024) and chosen % 1024 == 0
    assert "254 kB at most" in told["comments"] and "GB at most." in told["comments"]
    assert "there is room for at least " in told["comments"]
    longer = 2 * chosen
    assert found.cache.at_most(longer) > found.room >= found.cache.at_least(longer)
    assert made(config, f"{{gpu_memory: {gpu}, max_model_len: {longer}}}", weights)["max-model-len"] == longer
    with pytest.raises(UsageError, match=r"one sequence of 131,072 tokens takes at least 5\.6 GB of cache, 5\.5 GB"):
        made(config, f"{{gpu_memory: {gpu}, max_model_len: 131072}}", weights)


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


# --- what vLLM says itself ---------------------------------------------------------------------------


def need_of(answer: dict[str, Any], text: str, weights: int) -> CacheNeed:
    assert answer["error"] is None and answer["problem"] is None and answer["cache_error"] is None, answer
    need = cache_need(answer, text, weights)
    assert need is not None
    return need


@pytest.mark.vllm
def test_vllms_own_figure_is_within_the_bounds(tmp_path: Path, worker: VllmWorker) -> None:
    serves = (
        "{max_model_len: 4096}",
        "{max_model_len: 4096, tensor_parallel_size: 2, kv_cache_dtype: bfloat16}",
        "{max_model_len: 1000, extra: {max-num-batched-tokens: 512, no-enable-chunked-prefill: false}}",
    )
    rows, jobs = [], []
    for name, config in SHAPES.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        for serve in serves:
            read = recipe.parse(RECIPE.format(serve=serve))
            path = tmp_path / f"{len(jobs)}.yaml"
            path.write_text(profile.write(read, config, 10**9))
            jobs.append({"kind": "arguments", "profile": str(path), "checkpoint": str(tmp_path / name)})
            rows.append((name, read.serve, path.read_text()))
    for (name, serve, text), answer in zip(rows, worker.run(jobs, parallel=2), strict=True):
        need, cache = need_of(answer, text, 10**9), profile.fit(serve, SHAPES[name], 10**9, True).cache
        width = 2 if serve.kv_cache_dtype == "bfloat16" else 1
        parallel = serve.tensor_parallel_size
        assert need.bytes_per_token == profile.cache_bytes_per_token(SHAPES[name], width, parallel), (name, serve)
        assert need.max_model_len == serve.max_model_len and need.gpus == parallel and need.sequences is None
        taken = need.bytes_per_sequence
        assert cache.at_least(need.max_model_len) <= taken <= cache.at_most(need.max_model_len), (name, serve)
        if not cache.sliding and need.max_model_len % profile.BLOCK == 0:
            assert taken == cache.at_most(need.max_model_len), (name, serve)


@pytest.mark.vllm
def test_vllms_own_figure_against_the_stated_gpu(tmp_path: Path, worker: VllmWorker) -> None:
    """Gemma 3 27B with two whole prompts on their way: more than the plan could refuse."""
    config, weights = SHAPES["gemma3_27b"], 27 * 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    serve = "{{gpu_memory: 40GB, max_model_len: {length}, extra: {{max-num-batched-tokens: 65536}}}}"
    texts = {
        length: profile.write(recipe.parse(RECIPE.format(serve=serve.format(length=length))), config, weights)
        for length in (8192, 65536)
    }
    fits = hold_against(worker, texts[8192], tmp_path, weights)
    need = need_of(fits, texts[8192], weights)
    assert need.gpu_memory == "40GB" and need.sequences is not None and 1 < need.sequences < 4
    assert need.sentence.startswith("needs ") and need.sentence.endswith(" for one sequence of 8,192 tokens")
    assert need.as_json()["sequences"] == need.sequences
    refused = hold_against(worker, texts[65536], tmp_path, weights)
    assert refused["error"] is None and "for one sequence of 65,536 tokens, and 5.5" in refused["problem"], refused
    assert "of 40GB x 0.92 are left beside the weights" in refused["problem"]


@pytest.mark.vllm
@pytest.mark.parametrize(
    "extra", ["{pipeline-parallel-size: 2}", "{data-parallel-size: 2, data-parallel-backend: ray}"]
)
def test_a_cache_that_is_divided_otherwise_has_no_figure(tmp_path: Path, worker: VllmWorker, extra: str) -> None:
    config = SHAPES["llama"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = profile.write(recipe.parse(RECIPE.format(serve=f"{{gpu_memory: 80GB, extra: {extra}}}")), config, 10**9)
    answer = hold_against(worker, text, tmp_path, 10**9)
    assert answer["error"] is None and answer["problem"] is None and answer["cache"] is None, answer
    assert "is not counted" in answer["cache_error"] and cache_need(answer, text, 10**9) is None


@pytest.mark.vllm
def test_a_verification_reports_vllms_own_figure(
    tmp_path: Path, small_model: Any, quantize_here: Any, write_recipe: Any, worker: VllmWorker
) -> None:
    done = quantize_here(write_recipe(small_model("qwen3"), more="serve: {gpu_memory: 24GB}\n"), "verify=load")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    report = json.loads((out / "quantize/verify.json").read_text())
    figure, serve_yaml = report["vllm"]["serve_config"], out / "quantize/serve.yaml"
    told = yaml.safe_load(serve_yaml.read_text())
    assert figure["max_model_len"] == told["max-model-len"] and figure["gpu_memory"] == "24GB"
    (line,) = [line for line in report["checked"] if " of cache for one sequence of " in line]
    assert line.startswith(f"quantize/serve.yaml: {worker.environment.name} needs ")
    assert line.endswith(f"; {figure['sequences']:.1f} such sequences fit (24GB x 0.92)")

    serve_yaml.write_text(serve_yaml.read_text().replace("# In 24GB there", "# In 4GB there"))
    again = verify(out, None, "load", worker)
    (finding,) = [finding for finding in again.findings if again.level_of(finding) == "problem"]
    assert finding.code == "serve-config-too-large" and finding.subject == "quantize/serve.yaml"
    assert "and 0 B of 4GB x 0.92 are left" in finding.text and not again.proven_in_vllm


def test_a_figure_without_a_gpu_or_of_a_vllm_that_gives_none() -> None:
    parsed = {"kv_cache_dtype": "fp8", "max_model_len": 4096, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 2}
    cache = {"bytes_per_token": 1000, "bytes_per_sequence": 4_096_000, "max_model_len": 4096, "block": 16}
    answer = {"parsed": parsed, "cache": cache}
    need = cache_need(answer, "kv-cache-dtype: fp8\n", 10**9)
    assert need is not None and need.problem is None and need.sequences is None
    assert need.sentence == "needs 4.1 MB of cache on each of 2 GPUs for one sequence of 4,096 tokens"
    assert cache_need({**answer, "cache": None}, "", 10**9) is None
    assert cache_need({"parsed": None}, "", 10**9) is None
    head = "# In {} there is room for about 5 tokens of cache: 1.0 sequences of full length.\n"
    tight = cache_need(answer, head.format("9GB"), 10**9)
    assert tight is not None and tight.problem is not None and tight.sequences == 0
    assert tight.problem.endswith("and 0 B of 9GB x 0.5 are left beside the weights and 4.29 GB for vLLM")
    roomy = cache_need(answer, head.format("20GB"), 10**9)
    assert roomy is not None and roomy.problem is None
    assert roomy.room == 10**10 - 5 * 10**8 - profile.OVERHEAD and roomy.sequences == roomy.room / 4_096_000
    assert cache_need(answer, head.format("a lot"), 10**9) == need


def test_the_cache_that_an_h200_was_seen_to_have() -> None:
    """Qwen2.5-VL-3B's shape, vLLM 0.24.0: 3,440,272 tokens in BF16 and 7,026,976 in FP8; see docs/serving.md."""
    config = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    serve = Serve(gpu_memory="150.1GB")
    for weights, fp8, seen in ((7_510_000_000, False, 3_440_272), (4_740_000_000, True, 7_026_976)):
        found = profile.fit(serve, config, weights, fp8)
        assert found.room is not None and 0.98 * seen < found.room / found.cache.per_token < 1.01 * seen
