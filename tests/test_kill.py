"""SIGKILLs at random moments over full runs: the same bytes in the end, and nothing visible before."""

from __future__ import annotations

import filecmp
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.result import JOURNAL
from pipeline.plan.layout import UNIT_BYTES
from tests.conftest import QUANTIZE, ROOT

pytestmark = pytest.mark.kill

KILLS, MORE = 6, 40  # the second with --long


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One gigabyte, six units of output."""
    target = tmp_path_factory.mktemp("kill") / "source"
    script = ROOT / "scripts" / "make_checkpoint.py"
    subprocess.run(
        [sys.executable, script, "llama_3_2_1b", target, "--layers", "4", "--shard-size", "400MB"],
        check=True,
        capture_output=True,
    )
    return target


def same(directory: Path, reference: Path) -> bool:
    """Everything but the records of the runs: those name times and places."""
    names = sorted(p.relative_to(reference).as_posix() for p in reference.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    skipped = {"quantize/events.jsonl", "quantize/layers.json", "quantize/recipe.yaml", "quantize/serve.yaml"}
    return all(filecmp.cmp(directory / name, reference / name, shallow=False) for name in names if name not in skipped)


def test_kills_at_any_moment(source: Path, long: bool, tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(source, more="shard_size: 300MB\n")
    reference, output = tmp_path / "reference" / "out", tmp_path / "out"
    partial = tmp_path / "out.partial"

    def start(target: Path) -> subprocess.Popen[str]:
        command = [*QUANTIZE, str(recipe), f"output={target}"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    begun = time.monotonic()
    process = start(reference)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    seconds = time.monotonic() - begun

    dice = random.Random(20261121)
    kills = resumed = 0
    kept: list[int] = []
    wanted = MORE if long else KILLS
    while kills < wanted or (not resumed and kills < MORE):
        process = start(output)
        moment = dice.uniform(0, seconds)
        deadline = time.monotonic() + moment
        while time.monotonic() < deadline and process.poll() is None:
            if output.exists():
                assert (output / "quantize" / "verify.json").exists()
            time.sleep(0.002)
        if process.poll() is None:
            process.kill()
            process.communicate()
            kills += 1
            if dice.random() < 0.4:
                continue  # the run that resumes is killed as well
        else:
            process.communicate()
        if output.exists():
            assert same(output, reference), "visible before it was whole"
        else:
            journal = partial / JOURNAL
            lines = journal.read_bytes().splitlines() if journal.exists() else []
            finished = max(0, len(lines) - 1)
            process = start(output)
            text, _ = process.communicate()
            assert process.returncode == 0, text
            if finished:
                resumed += 1
                events = [
                    json.loads(line) for line in (output / "quantize" / "events.jsonl").read_text().splitlines() if line
                ]
                last = max(i for i, event in enumerate(events) if event["event"] == "run")
                ours = events[last:]
                assert ours[0]["done"] in (finished, finished - 1)  # the last line may have been torn
                kept.append(ours[0]["done"])
                written = sum(event["bytes"] for event in ours if event["event"] == "unit")
                whole = sum(e["nbytes"] for e in _pieces(output))
                before = sum(e["nbytes"] for e in _pieces(output) if e["unit"] in _first_units(output, ours[0]["done"]))
                assert written == whole - before, "a finished unit was written again"
                for event in ours:
                    if event["event"] == "resume":
                        assert event["bytes_rewritten_at_most"] <= UNIT_BYTES
                        assert "are written again" in text
            assert same(output, reference)
        shutil.rmtree(output)
        assert not partial.exists()
    assert resumed >= wanted // 8, "the kills came too early to test a resume"
    print(f"{kills} kills, {resumed} resumes with finished units {sorted(kept)}, one run takes {seconds:.2f} s")


def _pieces(output: Path) -> list[dict[str, int]]:
    entries = [json.loads(line) for line in (output / JOURNAL).read_text().splitlines()[1:]]
    return [{"unit": entry["unit"], "nbytes": piece[2]} for entry in entries for piece in entry["pieces"]]


def _first_units(output: Path, count: int) -> set[int]:
    entries = [json.loads(line) for line in (output / JOURNAL).read_text().splitlines()[1:]]
    return {entry["unit"] for entry in entries[:count]}
