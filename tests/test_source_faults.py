"""What vLLM shows of the source as well is named as the cause, and not excused; what it cannot judge is neither."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import open_checkpoint
from pipeline.verify.report import Report
from pipeline.verify.unjudged import unjudged
from pipeline.verify.verify import verify
from pipeline.verify.vllm_verdict import judge_generation
from pipeline.vllm_env.worker import VllmWorker
from tests import families
from tests.damage import edit_config
from tests.test_completeness import changed, rows

MODEL = "vllm.model_executor.models.llama.load_weights"
KERNEL = "vllm.model_executor.kernels.linear.init_nvfp4_linear_kernel"
KNOWN = {"named": ["LlamaForCausalLM"], "known": ["LlamaForCausalLM"], "usable": ["LlamaForCausalLM"]}


def record(frames: list[str], phase: str = "model", bases: tuple[str, ...] = ("ValueError",), **more: Any) -> Any:
    raised = {"type": f"builtins.{bases[0]}", "bases": list(bases), "phase": phase, "frames": frames}
    return {"error": "words", "platform": "cpu", "raised": raised, "architectures": KNOWN, "quant_method": None} | more


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (record([KERNEL, MODEL]), "vllm-no-kernel"),
        (record(["vllm.platforms.interface.verify_quantization"]), "vllm-no-kernel"),
        (record([MODEL], bases=("NotImplementedError", "RuntimeError")), "vllm-no-kernel"),
        (record([MODEL], quant_method={"named": "new", "known": False}), "vllm-no-kernel"),
        (record([MODEL], architectures={"named": ["New"], "known": [], "usable": []}), "vllm-no-class"),
        (record(["vllm.model_executor.models.registry.resolve_model_cls"]), "vllm-no-class"),
        (record([MODEL], bases=("ModuleNotFoundError", "ImportError")), "vllm-no-class"),
        (record(["transformers.dynamic_module_utils.resolve_trust_remote_code"]), "vllm-no-class"),
        (record([MODEL]), None),
        (record([MODEL], phase="weights"), None),
        (record([KERNEL], phase="weights", bases=("NotImplementedError",)), None),
        ({"error": "its process was ended", "lost": True, "cut_off": True}, None),
        (record([KERNEL]) | {"lost": True}, None),
    ],
)
def test_the_origin_of_an_exception_tells_what_cannot_be_judged(made: Any, code: str | None) -> None:
    """Its words are the same each time, and those of a missing kernel help no other exception."""
    found = unjudged(made)
    assert (found.code if found else None) == code
    assert unjudged(record([MODEL]) | {"error": "Failed to find a kernel, not supported on CPU"}) is None
    if found is not None:
        assert found.text.startswith("not validated (not proven in vLLM): ")


def test_a_class_that_runs_the_source_is_there() -> None:
    new = record([MODEL], architectures={"named": ["New"], "known": [], "usable": []})
    assert unjudged(new, {"error": None}) is None
    found = unjudged(new, {"error": "it has none"})
    assert found is not None and found.code == "vllm-no-class"


@pytest.mark.parametrize(("nats", "fails"), [(5.7683, True), (5.9, True), (5.5, False)])
def test_a_source_that_only_guesses_is_a_failure(nats: float, fails: bool) -> None:
    """ln 320 is 5.76832: a model of 320 tokens that answers the same to everything, and its result likewise."""
    answer = {"tokens": [1, 2], "logprobs": [-nats, -nats], "text": "!!"}
    before = {"nll": nats * 32, "counted": 32, "completions": [answer], "scored": [], "vocabulary": 320}
    report = Report("out", "source", True)
    judge_generation({"auto": {**before, "scored": [[-nats, -nats]]}}, before, ["a"], report)
    assert fails == any("the source's own perplexity is" in problem for problem in report.problems), report.problems
    assert report.passed != fails


# --- in vLLM -------------------------------------------------------------------------------------------


def pair(source: Path, root: Path, change: Callable[[Any], Any]) -> tuple[Path, Path]:
    """A result of a sound source, and that source; then the same is done to both."""
    from pipeline.recipe import recipe
    from pipeline.report.console import Console
    from pipeline.run import runner

    text = (
        f"model: {{source: '{source}'}}\noutput: '{root / 'sound'}'\nbackend: llmcompressor\nscheme: fp8_dynamic\n"
        "kv_cache: none\nverify: structure\n"
    )
    runner.run(recipe.parse(text), Console(quiet=True))
    return changed(source, root / "source", change), changed(root / "sound", root / "result", change)


def problems(made: tuple[Path, Path], worker: VllmWorker, level: Any = "load") -> Report:
    source, result = made
    return verify(result, open_checkpoint(source), level, worker)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("llama", lambda t: t.pop("lm_head.weight"), "lm_head.weight: nothing in the checkpoint fills"),
        ("llama", lambda t: t.pop("model.norm.weight"), "model.norm.weight: nothing in the checkpoint fills"),
        ("qwen2_5_vl", lambda t: t.pop("visual.merger.ln_q.weight"), "visual.merger.ln_q.weight: nothing in"),
        ("qwen2_5_vl", lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), "qkv_proj.bias: the checkpoint fills"),
    ],
)
def test_what_the_source_lacks_fails_the_result(
    family: str, change: Any, words: str, small_model: Callable[[str], Path], worker: VllmWorker, tmp_path: Path
) -> None:
    report = problems(pair(small_model(family), tmp_path, change), worker)
    said = [line for line in report.problems if words in line]
    assert said and "the source shows the same and is the cause" in said[0], (report.problems, report.notes)
    assert not report.proven_in_vllm


@pytest.mark.vllm
def test_what_vllm_refuses_of_both_fails(
    small_model: Callable[[str], Path], worker: VllmWorker, tmp_path: Path
) -> None:
    """More rows than the config counts; and an architecture that vLLM has no class for, which is another verdict."""
    made = pair(small_model("llama"), tmp_path, rows("model.embed_tokens.weight", 8))
    report = problems(made, worker)
    assert [f.code for f in report.findings if f.code.startswith("vllm")] == ["vllm-refuses-source"], report.findings
    assert any("refuses the source alike, which is the cause" in problem for problem in report.problems)
    new = shutil.copytree(small_model("llama"), tmp_path / "new")
    edit_config(new, lambda config: config.update(architectures=["NeverHeardOfForCausalLM"]))
    (tmp_path / "of new").mkdir()
    pair(new, tmp_path / "of new", lambda tensors: None)
    report = problems((new, tmp_path / "of new" / "sound"), worker)
    assert report.passed and not report.proven_in_vllm, report.problems
    assert "vllm-no-class" in [finding.code for finding in report.findings]


@pytest.mark.vllm
def test_a_model_that_answers_the_same_to_everything_fails(worker: VllmWorker, tmp_path: Path) -> None:
    """A head of zeros: every tensor is there and loads; the perplexity is the vocabulary's size, in both."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**{**families.TEXT, "head_dim": 32}, architectures=["LlamaForCausalLM"])
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(tmp_path / "silent")
    families.add_tokenizer(tmp_path / "silent")
    pair(tmp_path / "silent", tmp_path, lambda tensors: None)
    made = (tmp_path / "silent", tmp_path / "sound")
    report = problems(made, worker, "generate")
    assert "source-only-guesses" in [finding.code for finding in report.findings], (report.problems, report.notes)
    assert report.vllm["generated"]["auto"]["perplexity_ratio"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "names",
    [
        {"k_proj.output_scale": 0.5, "v_proj.output_scale": 0.25},  # AutoFP8's, and Quark's
        {"kv_scale": 0.5},
    ],
)
def test_names_of_cache_scales_are_vllms_to_know(
    names: dict[str, float], small_model: Callable[[str], Path], worker: VllmWorker, tmp_path: Path
) -> None:
    """Static FP8 as AutoFP8 writes it: quant_method fp8, one scale per tensor, and a scale of the cache per layer."""
    import torch
    from safetensors.torch import load_file, save_file

    source = small_model("llama")
    out = shutil.copytree(source, tmp_path / "out")
    tensors = {n: t for path in sorted(out.glob("*.safetensors")) for n, t in load_file(path).items()}
    for path in (*out.glob("*.safetensors"), *out.glob("*.index.json")):
        path.unlink()
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().amax() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.reshape(1)
        tensors[name.replace(".weight", ".input_scale")] = torch.ones(1)
        if name.endswith("k_proj.weight"):
            attention = name.removesuffix(".k_proj.weight")
            tensors |= {f"{attention}.{end}": torch.full((1,), value) for end, value in names.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    edit_config(out, lambda config: config.update(quantization_config=section))
    report = verify(out, None, "load", worker)
    assert list(report.vllm["loads"]) == ["auto", "fp8"], report.findings
    codes = {finding.code for finding in report.findings}
    wrong = {"vllm-kv-scale-missing", "vllm-kv-scale-one", "kv-scales-absent", "kv-scale-missing", "vllm-tensor-unused"}
    assert not codes & wrong, report.findings
    assert all(layer["k_scale"] == 0.5 for layer in report.vllm["loads"]["fp8"]["attention"])
