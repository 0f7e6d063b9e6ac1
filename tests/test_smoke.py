"""Smoke mode without vLLM: what is cut, what stays, and that nothing is left; with it, see tests/test_vllm.py."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import recipe, smoke
from pipeline.checkpoint.source import open_checkpoint
from pipeline.plan import make_plan
from pipeline.report.console import Console
from tests.conftest import CALIBRATED, QUANTIZE, SCHEMES, all_tensors, make_plain_checkpoint

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
    forecast = done.forecast
    assert forecast is not None and forecast.seconds == pytest.approx(sum(forecast.parts.values()))
    assert set(forecast.parts) == {"weights that need no data", "layers", "imports"}
    plan = make_plan(wanted(source, tmp_path / "out", captions), open_checkpoint(source))
    assert forecast.disk[0] == plan.output_nbytes and forecast.memory[1] == plan.peak_memory
    Console().show_smoke(done)
    told = capsys.readouterr().out
    assert f"smoke test passed: {KEPT[name]} of 3 layers" in told and "forecast of the whole run" in told


def test_kinds_of_layers(tmp_path: Path) -> None:
    """A dense layer among experts, a full attention after sliding ones, a vision tower that feeds four layers."""

    def kept(**config: Any) -> int:
        source = make_plain_checkpoint(tmp_path / str(len(list(tmp_path.iterdir()))), layers=8, config=config)
        text = (
            f"model: {{source: '{source}'}}\noutput: x\nbackend: llmcompressor\nscheme: fp8_dynamic\nkv_cache: none\n"
        )
        return smoke.layers_to_keep(make_plan(recipe.parse(text), open_checkpoint(source)))

    assert kept() == 2
    assert kept(layer_types=["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2) == 6
    assert kept(vision_config={"deepstack_visual_indexes": [1, 2, 3, 4]}) == 4


def test_a_config_is_cut_wherever_it_counts_layers() -> None:
    config = {
        "text_config": {
            "num_hidden_layers": 6, "layer_types": list("abcdef"), "mlp_only_layers": [0, 4], "max_window_layers": 6,
            "sections": [1, 2],
        },
        "vision_config": {"depth": 6, "fullatt_block_indexes": [1, 2, 3, 4, 5, 6]},
    }  # fmt: skip
    cut = smoke.truncated_config(config, 2)
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
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke test passed: 2 of 5 layers" in done.stdout
    assert "the whole run would be refused now" in done.stdout and "is no result of this program" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "recipe.yaml"])
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    done = quantize(file, "--keep")
    assert done.returncode == 2 and "--keep: it belongs to --smoke" in done.stderr


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


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_leaves_nothing(number: str, tmp_path: Path, small_model: Callable[[str], Path], captions: Path) -> None:
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
    with subprocess.Popen(
        [*QUANTIZE, path, "--smoke"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("smoke: "):
                break
        run.send_signal(getattr(signal, number))
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 75 and "nothing is left behind" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_failure_leaves_nothing(tmp_path: Path, small_model: Callable[[str], Path], captions: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = CALIBRATED.format(
        source=tmp_path / "bad", output=tmp_path / "out", backend="modelopt", scheme="fp8", captions=captions, samples=8
    )
    path.write_text(text)
    source = tmp_path / "bad"
    subprocess.run(["cp", "-r", small_model("qwen3"), source], check=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchClass"]}))
    done = subprocess.run([*QUANTIZE, path, "--smoke"], capture_output=True, text=True)
    assert done.returncode == 1 and "NoSuchClass" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "recipe.yaml"]


def test_the_forecast_scales_bytes_tokens_and_layers(
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
        {"event": "layer", "load": [0, 9], "forward": [0, 90], "quantize": [0, 9], "write": [0, 9], "bytes_read": layer,
         "tokens": 10, "device_bytes": 0},
        {"event": "layer", "load": [0, 1], "forward": [0, 4], "quantize": [0, 2], "write": [0, 1], "bytes_read": layer,
         "tokens": 100, "device_bytes": 5, "timed_batches": [[10, 0.3], [50, 0.9]]},
    ]  # fmt: skip
    record = tmp_path / "smoked" / "quantize" / "events.jsonl"
    record.parent.mkdir(parents=True)
    record.write_text("\n".join(json.dumps(event) for event in events))
    outcome: Any = SimpleNamespace(
        output=tmp_path / "smoked", calibrated=SimpleNamespace(imports=7.0), totals=SimpleNamespace(peak_rss_bytes=3)
    )
    made = smoke._forecast(plan, outcome, copy_rate=1e12)
    assert made.parts["weights that need no data"] == pytest.approx(sum(p.nbytes for p in plan.pieces) / 2000)
    batches = plan.calibration.batches  # 15 ms a token, and 150 ms a batch
    forward = batches.tokens * 0.015 + len(batches.batches) * 0.15
    assert made.parts["layers"] == pytest.approx(3 * (1 + 2 + forward))
    assert made.parts["imports"] == 7.0 and made.memory[0] == 3 and made.device == 5
    slow = smoke._forecast(plan, outcome, copy_rate=layer / 1000)  # a slow drive sets the pace
    assert slow.parts["layers"] == pytest.approx(3 * 1000)
