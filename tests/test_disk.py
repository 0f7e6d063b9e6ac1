"""A disk that fills up, and one that is read-only: real mounts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.result import JOURNAL
from tests.conftest import QUANTIZE, ROOT, all_tensors, assert_one_clear_line, make_plain_checkpoint

pytestmark = pytest.mark.mount


def test_too_little_disk_is_refused_before_the_first_byte(
    mounted: Any, tmp_path: Path, quantize: Any, write_recipe: Any
) -> None:
    """A drive that is too small as a whole, and one that something else fills."""
    small, full = mounted("size=12m"), mounted("size=40m")
    (full / "filler").write_bytes(b"x" * (30 << 20))
    source = make_plain_checkpoint(tmp_path / "source")
    for disk, words in ((small, ("the whole drive has",)), (full, ("free", "choose another output"))):
        recipe = write_recipe(source, disk / "out")
        for command in ([], ["plan"]):
            assert_one_clear_line(quantize(*command, recipe), 1, "needed for the result", *words)
    assert list(small.iterdir()) == [] and [path.name for path in full.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_and_is_fixed(mounted: Any, tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    """Another program takes the space while the stream runs; once it gives it back, the run goes on."""
    source = tmp_path / "source"
    script = ROOT / "scripts" / "make_checkpoint.py"
    subprocess.run([sys.executable, script, "llama_3_2_1b", source, "--layers", "2"], check=True, capture_output=True)
    disk = mounted("size=900m")
    recipe = write_recipe(source, disk / "out")
    process = subprocess.Popen(
        [*QUANTIZE, str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    journal, filler = disk / "out.partial" / JOURNAL, disk / "filler"
    stop = threading.Event()

    def fill() -> None:
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        with filler.open("wb", buffering=0) as file:
            while not stop.is_set():
                try:
                    file.write(b"x" * (1 << 20))
                except OSError:
                    time.sleep(0.001)

    thread = threading.Thread(target=fill)
    thread.start()
    out, err = process.communicate(timeout=120)
    stop.set()
    thread.join()
    assert_one_clear_line(
        subprocess.CompletedProcess([], process.returncode, out, err), 1, "the disk is full", "run the same command"
    )
    assert not (disk / "out").exists()
    again = quantize(recipe)  # still full: still one line
    assert_one_clear_line(again, 1)
    filler.unlink()
    done = quantize(recipe)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stdout
    assert quantize(recipe, f"output={tmp_path / 'whole'}").returncode == 0
    assert all_tensors(disk / "out") == all_tensors(tmp_path / "whole")
    verdict = json.loads((disk / "out" / "quantize" / "verify.json").read_text())
    assert verdict["passed"]


def test_a_read_only_output(mounted: Any, tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    disk = mounted("size=64m,ro")
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"), disk / "out")
    assert_one_clear_line(quantize(recipe), 1, "no permission", "Read-only file system", "you may write to")


def test_a_read_only_source_is_enough(mounted: Any, tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    disk = mounted("size=64m")
    source = make_plain_checkpoint(disk / "source")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert quantize(write_recipe(source)).returncode == 0
