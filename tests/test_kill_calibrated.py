"""SIGKILLs at random moments of calibrated runs: each resumed to the same bytes, from saved hidden states."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.result import JOURNAL
from tests.conftest import CALIBRATED, SCHEMES, SHARED
from tests.warm import Process, Warm

pytestmark = pytest.mark.kill

KILLS, MORE = 2, 10  # for each backend; the second with --long
SAMPLES, MORE_SAMPLES = 100, 1200
SAVE_ALWAYS = {"PIPELINE_SAVE_SECONDS": "0"}
CAPTIONS = SHARED / "data" / "coco" / "captions_val2017.json"


RECORDS = {
    "events.jsonl",
    "layers.json",
    "journal.jsonl",
    "recipe.yaml",
    "serve.yaml",
}  # times, saves and places of the runs


def same(directory: Path, reference: Path) -> bool:
    """Every file but the records of the runs; of the journal, the units with their hashes and facts."""
    names = sorted(p.relative_to(reference).as_posix() for p in reference.rglob("*") if p.is_file())
    if names != sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()):
        return False
    plain = [name for name in names if Path(name).name not in RECORDS]
    units = [[line for line in read(d / JOURNAL) if "hidden" not in line] for d in (directory, reference)]
    return units[0] == units[1] and all((directory / n).read_bytes() == (reference / n).read_bytes() for n in plain)


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by a kill
    return found


@pytest.mark.parametrize("backend", list(SCHEMES))
def test_every_kill_is_resumed_to_the_same_bytes(
    backend: str, long: bool, trained: Callable[[str], Path], warm: Warm, tmp_path: Path
) -> None:
    if not CAPTIONS.exists():
        pytest.skip(f"{CAPTIONS} is not here: COCO's captions are not part of the repository")
    source = trained("qwen2_5_vl_coco")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        CALIBRATED.format(source=source, output="x", backend=backend, scheme=SCHEMES[backend], captions=CAPTIONS,
                          samples=MORE_SAMPLES if long else SAMPLES)
    )  # fmt: skip

    def start(target: Path) -> Process:
        return warm.start(recipe, f"output={target}", env={"PIPELINE_SAVE_SECONDS": "0.3" if long else "0.05"})

    assert warm("--version").returncode == 0  # what takes long is imported now

    reference, output = tmp_path / "reference" / "out", tmp_path / "out"
    partial, log = tmp_path / "out.partial", tmp_path / "out.partial" / "quantize" / "events.jsonl"
    begun = time.time()
    process = start(reference)
    said = process.communicate()
    assert process.returncode == 0, said
    moments = {event["event"]: event["time"] for event in read(reference / "quantize" / "events.jsonl")}
    first, last = moments["run"] - begun, moments["verified"] - begun + 0.2
    assert any(event["event"] == "hidden_saved" for event in read(reference / "quantize" / "events.jsonl"))

    dice = random.Random(f"{backend} 20261121")
    resumed_from, replayed = [], 0
    wanted, number = MORE if long else KILLS, 0
    while number < wanted or (not resumed_from and number < MORE):
        number += 1
        process = start(output)
        deadline = time.monotonic() + dice.uniform(0.9 * first, last)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        if output.exists():
            assert same(output, reference), "visible before it was whole"
            shutil.rmtree(output)
            continue
        lines = read(partial / JOURNAL)
        finished = {line["unit"] for line in lines if "unit" in line}
        kept = list((partial / "quantize" / "hidden").glob("hidden-*.bin"))
        assert len(kept) <= 2, "one generation, and at most the one before"
        before = len(read(log))
        process = start(output)
        said = process.communicate()
        assert process.returncode == 0, said
        events = read(output / "quantize" / "events.jsonl")[before:]
        layers = [event for event in events if event["event"] == "layer"]
        written = [event for event in layers if not event.get("replayed")]
        units = {entry["unit"]: i for i, entry in enumerate(read(output / JOURNAL)[1:]) if "unit" in entry}
        assert len(units) == sum("unit" in line for line in read(output / JOURNAL)), "a finished unit was written again"
        if finished:
            resumed_from.append(len(finished))
            first_layer = next((e["first"] for e in events if e["event"] == "skeleton"), None)
            replayed += len(layers) - len(written)
            if first_layer is not None and first_layer > 0:
                assert layers[0]["index"] == first_layer
        assert same(output, reference), f"kill {number}"
        assert not list(output.rglob("hidden*")) and not partial.exists()
        shutil.rmtree(output)
    assert len(resumed_from) >= max(1, wanted // 3), "the kills came too early to test a resume"
    print(f"{backend}: {number} kills, resumed with finished units {sorted(resumed_from)}, {replayed} layers replayed")


@pytest.fixture(scope="module")
def killed(
    small_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, captions: Path, warm: Warm
) -> Path:
    """A run that was killed after it saved hidden states, in ``out.partial``, and one that was not, in ``straight``."""
    root = tmp_path_factory.mktemp("killed")
    recipe = root / "r.yaml"
    recipe.write_text(
        CALIBRATED.format(source=small_model("qwen3"), output="x", backend="llmcompressor", scheme="fp8_dynamic",
                          captions=captions, samples=60)
    )  # fmt: skip
    code = (
        "import sys, os, signal\n"
        "from pipeline.stream import layers\n"
        "save = layers._Snapshots.save\n"
        "def stop(self, layer):\n"
        "    save(self, layer)\n"
        "    if layer == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "layers._Snapshots.save = stop\n"
        "from pipeline.cli import main; main(sys.argv[1:], prog_name='quantize')"
    )
    assert warm(recipe, f"output={root / 'out'}", code=code, env=SAVE_ALWAYS).returncode == -9
    (root / "straight").mkdir()
    done = warm(recipe, f"output={root / 'straight' / 'out'}", env=SAVE_ALWAYS)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.mark.parametrize("harm", ["gone", "damaged", "cut"])
def test_saved_states_that_are_lost_cost_a_replay(harm: str, killed: Path, warm: Warm, tmp_path: Path) -> None:
    """SIGKILL after a save, then harm to the file: the run starts its forwards over and ends in the same bytes."""
    shutil.copytree(killed / "out.partial", tmp_path / "out.partial")
    (saved,) = (tmp_path / "out.partial" / "quantize" / "hidden").glob("hidden-*.bin")
    assert saved.name == "hidden-00001.bin"
    if harm == "gone":
        saved.unlink()
    elif harm == "cut":
        os.truncate(saved, saved.stat().st_size - 1)
    else:
        raw = bytearray(saved.read_bytes())
        raw[7] ^= 1
        saved.write_bytes(raw)
    done = warm(killed / "r.yaml", f"output={tmp_path / 'out'}", env=SAVE_ALWAYS)
    assert done.returncode == 0, done.stdout + done.stderr
    events = read(tmp_path / "out" / "quantize" / "events.jsonl")
    assert [e["layer"] for e in events if e["event"] == "hidden_lost"] == [1]
    assert [e["index"] for e in events if e["event"] == "layer"] == [0, 1, 0, 1, 2]
    assert [bool(e.get("replayed")) for e in events if e["event"] == "layer"] == [False, False, True, True, False]
    assert same(tmp_path / "out", killed / "straight" / "out")
