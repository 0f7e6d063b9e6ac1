"""Smoke mode without vLLM: what is cut, what stays, and that nothing is left; with it, see tests/test_vllm.py."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import DiskFull
from pipeline.model.truncate import layers_to_keep, truncated_config
from pipeline.plan.plan import make_plan
from pipeline.recipe import recipe
from pipeline.report.console import Console
from pipeline.run import smoke
from pipeline.run.estimate import estimate_from_smoke, forward_seconds
from pipeline.run.smoke import SAMPLES
from tests.conftest import (
    CALIBRATED,
    RECIPE,
    SCHEMES,
    all_tensors,
    assert_one_clear_line,
    make_plain_checkpoint,
    put_value,
)
from tests.warm import Warm

# layers kept of a family's three: every kind of layer, and as many as a vision tower feeds
KEPT = {"llama_tied": 2, "qwen2_5_vl": 2, "qwen3_vl": 2, "qwen3_moe": 2, "qwen2_moe": 2, "qwen3_vl_moe": 2, "phi3": 2}


def wanted(source: Path, output: Path, captions: Path, backend: str = "modelopt", more: str = "") -> recipe.Recipe:
    text = CALIBRATED.format(
        source=source, output=output, backend=backend, scheme=SCHEMES[backend], captions=captions, samples=40
    )
    return recipe.parse(text + more)


@pytest.mark.parametrize("name", list(KEPT))
def test_the_first_layers_and_everything_outside(
    name: str, small_model: Callable[[str], Path], captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small_model(name)
    done = smoke.smoke(wanted(source, tmp_path / "out", captions), Console(), keep=True)
    assert done.report.passed and done.layers == (KEPT[name], 3), done.report.problems
    assert done.kept is not None and done.kept.parent == tmp_path and not (tmp_path / "out").exists()
    whole, cut = all_tensors(source), all_tensors(done.kept / "source")
    assert all(whole[name] == tensor for name, tensor in cut.items())
    lost = whole.keys() - cut.keys()
    assert lost and all(".layers.2." in name for name in lost)
    result = open_checkpoint(done.kept / "out")
    assert any(tensor.dtype == "F8_E4M3" for tensor in result.tensors.values())
    estimate = done.estimate
    assert estimate is not None and estimate.seconds == pytest.approx(sum(estimate.parts.values()))
    assert list(estimate.parts) == ["imports", "stream", "weights", "forwards"]
    plan = make_plan(wanted(source, tmp_path / "out", captions), open_checkpoint(source))
    assert estimate.disk[0] == plan.output_nbytes and estimate.memory[1] == plan.peak_memory
    Console().show_smoke(done)
    told = capsys.readouterr().out
    assert f"smoke test passed: {KEPT[name]} of 3 layers" in told and "estimate of the whole run" in told


def test_kinds_of_layers(tmp_path: Path) -> None:
    """A dense layer among experts, a full attention after sliding ones, a vision tower that feeds four layers."""

    def kept(tower: dict[str, tuple[int, ...]] | None = None, **config: Any) -> int:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        source = make_plain_checkpoint(place, layers=8, config=config, extra=tower)
        text = (
            f"model: {{source: '{source}'}}\noutput: x\nbackend: llmcompressor\nscheme: fp8_dynamic\nkv_cache: none\n"
        )
        made = make_plan(recipe.parse(text), open_checkpoint(source))
        return layers_to_keep(made.checkpoint, made.selection)

    assert kept() == 2
    assert kept(layer_types=["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2) == 6
    tower = {"visual.patch_embed.weight": (8, 8)}
    assert kept(tower, vision_config={"deepstack_visual_indexes": [1, 2, 3, 4]}) == 4


def test_a_config_is_cut_wherever_it_counts_layers() -> None:
    config = {
        "text_config": {
            "num_hidden_layers": 6, "layer_types": list("abcdef"), "mlp_only_layers": [0, 4], "max_window_layers": 6,
            "sections": [1, 2],
        },
        "vision_config": {"depth": 6, "fullatt_block_indexes": [1, 2, 3, 4, 5, 6]},
    }  # fmt: skip
    cut = truncated_config(config, 2)
    assert cut["text_config"] == {
        "num_hidden_layers": 2, "layer_types": ["a", "b"], "mlp_only_layers": [0], "max_window_layers": 2,
        "sections": [1, 2],
    }  # fmt: skip
    assert cut["vision_config"] == config["vision_config"] and config["text_config"]["num_hidden_layers"] == 6


def test_output_is_not_touched_and_nothing_is_left(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source", layers=5)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("not to be touched")
    before = sorted(path.name for path in tmp_path.iterdir())
    file = write_recipe(source)
    done = quantize(file, "--smoke")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "smoke test passed: 2 of 5 layers" in done.stdout
    assert "the whole run would be refused now" in done.stdout and "is no result of this program" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "recipe.yaml"])
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    done = quantize(file, "--keep")
    assert done.returncode == 2 and "--keep: it belongs to --smoke" in done.stderr
    assert_one_clear_line(quantize(file, "--smoke", "--fresh"), 2, "--fresh: it belongs to a whole run")


@pytest.mark.parametrize("name", ["source", "Source", "source.partial", ".source", "lock"])
def test_any_name_of_an_output_will_do(name: str, tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "from")
    done = quantize(write_recipe(source, tmp_path / name), "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "recipe.yaml"]


def test_an_ignore_of_a_later_layer_is_none_of_the_first_ones(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source", layers=5)
    patterns = "ignore: [model.layers.4.mlp.down_proj, 're:.*layers.1.self_attn.o_proj']\n"
    done = quantize(write_recipe(source, tmp_path / "new" / "deep" / "out", patterns), "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 tensors become FP8" in done.stdout  # seven a layer, and one of them ignored
    assert not (tmp_path / "new").exists()
    done = quantize(write_recipe(source, source / "out"), "--smoke")
    assert done.returncode == 2 and "the source is never written to" in done.stderr
    assert not list(source.glob(".out*"))
    done = quantize(write_recipe(source), "--smoke", f"runtime.work_directory={source / 'scratch'}")
    assert_one_clear_line(done, 2, f"runtime.work_directory: {source} lies in the source")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_leaves_nothing(
    number: str, tmp_path: Path, small_model: Callable[[str], Path], captions: Path, warm: Warm
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        CALIBRATED.format(
            source=small_model("qwen3"),
            output=tmp_path / "out",
            backend="modelopt",
            scheme="fp8",
            captions=captions,
            samples=8,
        )
    )
    keep = ["--keep"] if number == "SIGTERM" else []  # nothing is to be looked at
    run = warm.start(path, "--smoke", *keep)
    run.until("smoke: ")  # the copy
    run.send_signal(getattr(signal, number))
    _, errors = run.communicate()
    assert run.returncode == 75 and "nothing is left behind" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_a_kill_leaves_the_next_one_removes(
    tmp_path: Path, small_model: Callable[[str], Path], captions: Path, warm: Warm
) -> None:
    """Of this output alone, and neither what was kept nor what another smoke test works in."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        CALIBRATED.format(
            source=small_model("qwen3"), output=tmp_path / "out", backend="modelopt", scheme="fp8",
            captions=captions, samples=8,
        )
    )  # fmt: skip
    run = warm.start(path, "--smoke")
    run.until("smoke: ")
    run.kill()
    run.communicate()
    (left,) = tmp_path.glob(".out.smoke-*")
    assert list((left / "source").glob("*.safetensors"))
    (tmp_path / ".out.smoke-kept" / "out").mkdir(parents=True)
    busy = tmp_path / ".out.smoke-busy"
    busy.mkdir()
    with (busy / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = warm(path, "--smoke")
    assert done.returncode == 0, done.stderr
    assert f"removed {left}, which a killed smoke test had left behind" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.smoke-busy", ".out.smoke-kept", "recipe.yaml"]


@pytest.mark.parametrize("keep", [False, True])
def test_what_fails_verification_is_told_and_kept_where_asked(
    keep: bool, tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.run import finalize

    file = write_recipe(make_plain_checkpoint(tmp_path / "from", layers=4))
    write = finalize.config_with
    monkeypatch.setattr(finalize, "config_with", lambda text, section: write(text, {**section, "ignore": []}))
    done = smoke.smoke(recipe.load(file), Console(), keep)
    assert not done.report.passed and done.estimate is None
    Console().show_smoke(done)
    told = capsys.readouterr().out
    assert "PROBLEM: lm_head: BF16, but the config does not ignore it" in told
    assert "stays here" not in told and "smoke test FAILED: 2 of 4 layers" in told
    if keep:
        assert done.kept is not None and f"kept: {done.kept}" in told
        verdict = json.loads((done.kept / "out.partial" / "quantize" / "verify.json").read_text())
        assert verdict["problems"] == done.report.problems
    else:
        assert done.kept is None and "are removed; --keep leaves them to look at" in told
        assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "recipe.yaml"]


def test_every_gate_is_heard(tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a gate of someone's own finds fails the smoke test as it would fail the run."""
    from pipeline.run import gates, runner
    from pipeline.verify.report import Report

    def own(candidate: gates.Candidate) -> Report:
        report = Report(str(candidate.directory), None, candidate.report.produced_here)
        report.add("engine-not-finite", "", "my gate finds a problem")
        return report

    wanted = recipe.load(write_recipe(make_plain_checkpoint(tmp_path / "source", layers=4)))
    monkeypatch.setattr(runner, "pass_gates", lambda candidate: gates.pass_gates(candidate, [*gates.GATES, own]))
    found = smoke.smoke(wanted, Console(quiet=True))
    assert not found.report.passed and "my gate finds a problem" in found.report.problems


def test_a_drive_without_room_is_told_before_the_copy(mounted: Any, tmp_path: Path, quantize: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "from", layers=3)
    small = mounted("size=8m")
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(source=source, output=small / "out"))
    done = quantize(file, "--smoke")
    assert_one_clear_line(done, 1, f"{small}: ", "needed for a copy of the first layers and their result")
    assert not list(small.iterdir())
    done = quantize(file, "--smoke", f"output={source / 'config.json' / 'out'}")
    assert done.returncode == 2, "the source"
    (tmp_path / "file").write_text("")
    done = quantize(file, "--smoke", f"output={tmp_path / 'file' / 'out'}")
    assert_one_clear_line(done, 1, "making a place for the first layers", str(tmp_path / "file"))
    unwritable = mounted("ro")
    done = quantize(file, "--smoke", f"output={unwritable / 'out'}")
    assert_one_clear_line(done, 1, "for the first layers", str(unwritable))


def test_a_drive_too_small_for_the_whole_run(mounted: Any, tmp_path: Path, quantize: Any) -> None:
    """The smoke test goes elsewhere, and passes; the whole run would end with 1, and so does this."""
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(source=make_plain_checkpoint(tmp_path / "from"), output=mounted("size=8m") / "out"))
    done = quantize(file, "--smoke", f"runtime.work_directory={tmp_path}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "smoke test passed" in done.stdout and "the whole run would be refused now" in done.stdout


def test_small_files_are_counted_twice(mounted: Any, tmp_path: Path, quantize: Any) -> None:
    source, small = make_plain_checkpoint(tmp_path / "from"), mounted("size=40m")
    (source / "tokenizer.json").write_bytes(b" " * (15 << 20))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(source=source, output=small / "out"))
    assert_one_clear_line(quantize(file, "--smoke"), 1, "needed for a copy of the first layers and their result")
    assert not list(small.iterdir())


def test_a_drive_that_fills_up_is_told_with_its_path(
    mounted: Any, tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_plain_checkpoint(tmp_path / "from", layers=3)
    small = mounted("size=64k")
    monkeypatch.setattr(smoke, "_refuse_too_little_room", lambda *_: None)  # something else fills it meanwhile
    with pytest.raises(DiskFull, match=r"trying the first layers in .*\.out\.smoke-.*\n  .* is removed; --keep"):
        smoke.smoke(recipe.load(write_recipe(source, small / "out")), Console())
    assert not list(small.iterdir())


def test_a_failure_leaves_nothing(
    tmp_path: Path, small_model: Callable[[str], Path], captions: Path, warm: Warm
) -> None:
    path = tmp_path / "recipe.yaml"
    text = CALIBRATED.format(
        source=tmp_path / "bad", output=tmp_path / "out", backend="modelopt", scheme="fp8", captions=captions, samples=8
    )
    path.write_text(text)
    source = tmp_path / "bad"
    shutil.copytree(small_model("qwen3"), source)
    put_value(source, damaged := "model.layers.0.mlp.down_proj.weight", 0x7FC0)  # known only once it is read
    done = warm(path, "--smoke")
    assert done.returncode == 1 and f"{damaged}: NaN" in done.stderr and "Traceback" not in done.stderr
    assert "is removed; --keep leaves it to look at" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "recipe.yaml"]
    done = warm(path, "--smoke", "--keep")
    (place,) = tmp_path.glob(".out.smoke-*")
    assert done.returncode == 1 and f"{damaged}: NaN" in done.stderr and f"kept: {place}" in done.stderr
    assert sorted(path.name for path in place.iterdir()) == ["out.partial", "source"]


def test_the_estimate_scales_bytes_tokens_and_layers(
    small_model: Callable[[str], Path], captions: Path, tmp_path: Path
) -> None:
    """From numbers that are known: the whole source has 3 layers and 40 captions."""
    from types import SimpleNamespace

    source = small_model("qwen3")
    plan = make_plan(wanted(source, tmp_path / "out", captions), open_checkpoint(source))
    assert plan.calibration is not None
    layer = plan.layers[0].nbytes
    events = [
        {"event": "piece", "read": [0.0, 0.1], "write": [0.1, 0.5], "bytes_read": 1000},
        {"event": "layer", "load": [0, 1], "forward": [1, 91], "quantize": [91, 93], "write": [93, 94],
         "bytes_read": layer, "tokens": 100, "device_bytes": 0, "timed_batches": [[10, 9.0], [50, 9.0]]},
        {"event": "layer", "load": [93, 94], "forward": [94, 98], "quantize": [98, 100], "write": [100, 101],
         "bytes_read": layer, "tokens": 100, "device_bytes": 5, "timed_batches": [[10, 0.3], [50, 0.9]]},
    ]  # fmt: skip
    record = tmp_path / "smoked" / "quantize" / "events.jsonl"
    record.parent.mkdir(parents=True)
    record.write_text("\n".join(json.dumps(event) for event in events))
    outcome: Any = SimpleNamespace(output=tmp_path / "smoked", totals=SimpleNamespace(peak_rss_bytes=3))
    made = estimate_from_smoke(plan, outcome, reading=1e12, imports=7.0)
    assert made.parts["stream"] == pytest.approx(sum(p.nbytes for p in plan.pieces) / 2000)
    batches = plan.calibration.batches  # 15 ms a token, and 150 ms a batch
    forward = batches.tokens * 0.015 + len(batches.batches) * 0.15
    warming = 93 - 7  # of the first layer, once
    assert made.parts["weights"] == pytest.approx(3 * (1 + 2) + warming)
    assert made.parts["forwards"] == pytest.approx(3 * forward)
    assert made.parts["imports"] == 7.0 and made.memory[0] == 3 and made.device == 5
    slow = estimate_from_smoke(plan, outcome, reading=layer / 1000, imports=7.0)  # a slow drive sets the pace
    assert slow.parts["weights"] + slow.parts["forwards"] == pytest.approx(3 * 1000 + warming)


def test_forwards_by_batch_and_token() -> None:
    """2 ms a batch and 0.1 ms a token, through whatever noise there is."""
    import random

    def truth(tokens: int) -> float:
        return 0.002 + 0.0001 * tokens

    sizes = [5, 8, 12, 20, 33, 40, 64, 90, 130, 200, 300]
    whole = forward_seconds([[(n, truth(n)) for n in sizes]], 30, 9000)
    assert whole == pytest.approx(30 * 0.002 + 9000 * 0.0001)
    disturbed = [(n, truth(n) + (0.5 if n in (5, 64) else 0.0)) for n in sizes]  # the smallest is the slowest
    assert forward_seconds([disturbed], 30, 9000) == pytest.approx(whole, rel=0.02)
    assert forward_seconds([disturbed, *[[(n, truth(n)) for n in sizes]] * 2], 30, 9000) == pytest.approx(whole)
    noise = random.Random(5)
    for _ in range(50):
        noisy = [(n, truth(n) * noise.uniform(0.8, 1.2)) for n in sizes]
        assert forward_seconds([noisy], 30, 9000) == pytest.approx(whole, rel=0.3)
    inverted = forward_seconds([[(10, 0.9), (50, 0.3)]], 30, 9000)  # no time a token, at the least
    assert 30 * 0.3 <= inverted <= 30 * 0.9
    assert forward_seconds([[(10, 0.01), (50, 0.5)]], 2, 100) == pytest.approx(100 * 0.0055)  # nothing a batch
    assert forward_seconds([[(50, 0.5)]], 2, 100) == pytest.approx(1.0)


def test_batches_are_timed_but_not_without_end(
    small_model: Callable[[str], Path], convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stream import forward

    def timed(out: Path) -> list[list[float]]:
        lines = (out / "quantize" / "events.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "layer"]
        (sizes,) = {tuple(tokens for tokens, _ in event["timed_batches"]) for event in events}
        for event in events:
            assert sum(seconds for _, seconds in event["timed_batches"]) <= event["forward"][1] - event["forward"][0]
        return sorted(sizes)

    every = timed(convert(small_model("qwen3"), "llmcompressor", "every", samples=48))
    monkeypatch.setattr(forward, "TIMED", 3)
    some = timed(convert(small_model("qwen3"), "llmcompressor", "some", samples=48))
    assert len(every) > 4 and len(some) <= 4 and {every[0], every[-1]} <= set(some) <= set(every)


def test_small_layers_run_more_captions(small_model: Callable[[str], Path], captions: Path, tmp_path: Path) -> None:
    source = small_model("qwen3")
    asked = wanted(source, tmp_path / "out", captions)
    plan = make_plan(asked, open_checkpoint(source))

    def samples() -> int:
        small = smoke._small(asked, tmp_path, plan, 2)
        assert small.calibration is not None
        return small.calibration.samples

    assert samples() == 40  # all there are
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoke, "LARGE_LAYER", plan.layers[0].nbytes // 2)
        assert samples() == SAMPLES
