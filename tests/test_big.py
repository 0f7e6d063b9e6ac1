"""Gigabytes: memory stays below what the plan promises and does not grow with the depth."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CALIBRATED, ROOT, SCHEMES
from tests.families import add_tokenizer

pytestmark = pytest.mark.big


def convert(shape: str, layers: int, tmp_path: Path, quantize: Any, write_recipe: Any) -> tuple[int, int, int]:
    """Peak RSS, the plan's bound and the source's size, in bytes."""
    source = tmp_path / f"{shape}-{layers}"
    script = ROOT / "scripts" / "make_checkpoint.py"
    subprocess.run([sys.executable, script, shape, source, "--layers", str(layers)], check=True, capture_output=True)
    recipe = write_recipe(source)
    told = json.loads(quantize("plan", recipe, "runtime.threads=2", "--json").stdout)
    done = quantize(recipe, "runtime.threads=2")
    assert done.returncode == 0, done.stderr
    events = (tmp_path / "out" / "quantize" / "events.jsonl").read_text().splitlines()
    (streamed,) = (event for event in map(json.loads, events) if event["event"] == "streamed")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(source)
    return streamed["peak_rss_bytes"], told["peak_memory_bytes"], told["source"]["bytes"]


def test_memory_is_bounded_and_does_not_grow_with_depth(
    long: bool, tmp_path: Path, quantize: Any, write_recipe: Any
) -> None:
    layers = 12 if long else 4
    shallow, bound, size = convert("llama_3_2_1b", layers, tmp_path, quantize, write_recipe)
    deep, bound_of_deep, size_of_deep = convert("llama_3_2_1b", 2 * layers, tmp_path, quantize, write_recipe)
    assert size > 0.9e9 and size_of_deep > size + layers * 120e6
    assert bound <= bound_of_deep < bound + 2e6 and bound_of_deep < 0.8e9, "a plan's entries, no weights"
    assert shallow < bound and deep < bound
    assert deep < shallow + 40e6
    print(
        f"peak RSS {shallow / 1e6:.0f} MB for {size / 1e9:.2f} GB, {deep / 1e6:.0f} MB for {size_of_deep / 1e9:.2f} GB"
    )


def test_fused_experts_of_real_size(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    peak, bound, size = convert("qwen3_vl_30b_a3b", 1, tmp_path, quantize, write_recipe)
    assert size > 3.5e9
    assert peak < bound < 0.8e9


@pytest.mark.parametrize("backend", list(SCHEMES))
def test_calibrated_memory_does_not_grow_with_depth(
    backend: str, long: bool, tmp_path: Path, captions: Path, quantize: Any
) -> None:
    """Twice the layers, the same width: peaks within 5%; each weight read once, a forward a layer and batch.

    A peak is where threads happened to meet, so one run may be some percent above another of the same model: the lowest
    of up to three counts. Memory that grew with the depth would be in each of them.
    """
    layers_of_both, samples = ((14, 28), 16) if long else ((3, 6), 4)
    peaks: dict[int, list[int]] = {layers: [] for layers in layers_of_both}
    for layers in peaks:
        script = ROOT / "scripts" / "make_checkpoint.py"
        source = tmp_path / f"source-{layers}"
        subprocess.run(
            [sys.executable, script, "llama_3_2_1b", source, "--layers", str(layers)], check=True, capture_output=True
        )
        add_tokenizer(source)
    for _ in range(3):
        for layers, seen in peaks.items():
            seen.append(_calibrated_peak(tmp_path, layers, backend, captions, samples, quantize))
        shallow, deep = (min(seen) for seen in peaks.values())
        if abs(deep - shallow) < 0.05 * shallow:
            return
    raise AssertionError(peaks)


def _calibrated_peak(tmp_path: Path, layers: int, backend: str, captions: Path, samples: int, quantize: Any) -> int:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        CALIBRATED.format(source=tmp_path / f"source-{layers}", output=tmp_path / "out", backend=backend,
                          scheme=SCHEMES[backend], captions=captions, samples=samples)
    )  # fmt: skip
    told = json.loads(quantize("plan", recipe, "runtime.threads=2", "--json").stdout)
    done = quantize(recipe, "runtime.threads=2")
    assert done.returncode == 0, done.stdout + done.stderr
    batches = json.loads((tmp_path / "out" / "quantize" / "calibration.json").read_text())["batches"]["batches"]
    assert f"{layers} layers: {layers * 9} weights read once, {layers * batches} layer forwards" in done.stdout
    events = map(json.loads, (tmp_path / "out" / "quantize" / "events.jsonl").read_text().splitlines())
    peak = next(int(event["peak_rss_bytes"]) for event in events if event["event"] == "streamed")
    assert peak < told["peak_memory_bytes"]
    print(f"{backend}: {layers} layers, {told['source']['bytes'] / 1e9:.2f} GB: peak RSS {peak / 1e9:.3f} GB")
    shutil.rmtree(tmp_path / "out")
    return peak
