"""Small runs of a batch, from the command line to the report; twelve jobs: test_batch_twelve.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch import queue
from tests import batch_runs
from tests.batch_runs import BatchRun
from tests.conftest import CALIBRATED, QUANTIZE, RECIPE, assert_one_clear_line, make_plain_checkpoint


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., BatchRun]:
    """A run of data-free jobs, by name and layers."""

    def make(**jobs: int) -> BatchRun:
        made = BatchRun(tmp_path, tmp_path / "recipes")
        made.recipes.mkdir()
        for name, layers in jobs.items():
            source = make_plain_checkpoint(tmp_path / "sources" / name, layers=layers)
            (made.recipes / f"{name}.yaml").write_text(RECIPE.format(source=source, output=made.output(name)))
        return made

    return make


def test_a_small_run(small_run: Callable[..., BatchRun], tmp_path: Path) -> None:
    """The largest first; the table before; lines, status and report after; and once more, nothing to do."""
    small = small_run(one=1, three=3, two=2)
    assert small.start("--on-finish", f"env | grep ^BATCH_ > {tmp_path}/hook; exit 3").wait(120) == 0
    said = small.said()
    assert said.index("three: started") < said.index("two: started") < said.index("one: started")
    assert "3 to do, 0 published already, 0 refused" in said and "estimates after the first job" in said
    assert "ended with status 3" in said, "the hook's failure is said, and no reason to fail"
    hook = dict(line.split("=", 1) for line in (tmp_path / "hook").read_text().splitlines())
    assert hook["BATCH_PUBLISHED"] == "3" and hook["BATCH_FAILED"] == "0" and hook["BATCH_EXIT_STATUS"] == "0"
    assert Path(hook["BATCH_REPORT"]).exists()
    report = small.report()
    assert report["exit_status"] == 0 and report["counts"]["published"] == 3 and report["forecast"]["jobs"] == 2
    status = subprocess.run([*QUANTIZE, "batch", "--status", tmp_path / "batch"], capture_output=True, text=True)
    assert status.returncode == 0 and status.stdout.count("published") == 3 and "ended" in status.stdout
    before = {name: (small.output(name) / "config.json").stat().st_mtime_ns for name in ("one", "two", "three")}
    assert small.start().wait(120) == 0
    assert "0 to do, 3 published already" in small.said()
    assert before == {name: (small.output(name) / "config.json").stat().st_mtime_ns for name in before}
    assert small.report()["counts"]["published"] == 3


def test_what_is_gone_is_made_again(small_run: Callable[..., BatchRun]) -> None:

    small = small_run(one=1, two=2)
    assert small.start().wait(120) == 0
    shutil.rmtree(small.output("one"))
    assert small.start().wait(120) == 0
    assert small.output("one").is_dir() and "its result is gone" in small.jobs()["one"]["notes"][0]


def test_a_dry_run_starts_nothing(small_run: Callable[..., BatchRun]) -> None:
    small = small_run(one=1)
    (small.recipes / "bad.yaml").write_text("model: x\n")
    assert small.start("--dry-run").wait(60) == 1
    assert "1 to do, 0 published already, 1 refused" in small.said() and "bad: refused (recipe)" in small.said()
    assert not (small.root / "results").exists()


def test_the_window_lets_nothing_in_that_it_would_cut(small_run: Callable[..., BatchRun], tmp_path: Path) -> None:
    """Twenty gigabytes do not go through in twenty seconds, by the rough rule; the small job behind them does."""
    small = small_run(quick=1)
    large = batch_runs.with_a_hole(tmp_path / "sources" / "large", 20 * 10**9)
    (small.recipes / "large.yaml").write_text(RECIPE.format(source=large, output=small.output("large")))
    assert small.start("--budget", "20s").wait(60) == 75
    jobs = small.jobs()
    assert jobs["quick"]["status"] == "published" and not jobs["large"]["attempts"]
    assert (jobs["large"]["status"], jobs["large"]["class"]) == ("left", "window")
    assert "not end within the window" in jobs["large"]["reason"] and jobs["large"]["resume"]
    assert not small.output("large").exists() and not Path(f"{small.output('large')}.partial").exists()
    (small.recipes / "large.yaml").unlink()
    assert small.start("--budget", "10m").wait(60) == 0, "tomorrow"


def test_a_job_comes_in_when_the_estimate_gets_better(small_run: Callable[..., BatchRun], tmp_path: Path) -> None:
    """By a rule that is far too slow the large one does not fit; after the first job it does."""
    small = small_run(large=9, quick=1)
    slow = "import pipeline.run.estimate as e; e.STREAM = 5e3 / 3; from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", slow, "batch", small.recipes, "--directory", tmp_path / "batch", "--budget", "180s"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("quick: started") < done.stdout.index("large: started"), "the largest first, where it fits"


def test_a_dry_run_changes_nothing(small_run: Callable[..., BatchRun], tmp_path: Path) -> None:
    """What it refuses, the run itself may find repaired; what is published stays so; nobody is called."""

    small = small_run(one=1, two=2)
    shutil.move(tmp_path / "sources" / "two", tmp_path / "aside")
    assert small.start("--dry-run", "--on-failure", f"touch {tmp_path}/called").wait(60) == 1
    assert not (tmp_path / "batch").exists() and not (tmp_path / "called").exists()
    shutil.move(tmp_path / "aside", tmp_path / "sources" / "two")
    assert small.start().wait(60) == 0
    before = (tmp_path / "batch" / "batch.jsonl").read_bytes()
    shutil.move(tmp_path / "sources" / "two", tmp_path / "aside")
    assert small.start("--dry-run").wait(60) == 0, "a published job needs no source"
    assert (tmp_path / "batch" / "batch.jsonl").read_bytes() == before
    assert small.start().wait(60) == 0 and small.jobs()["two"]["status"] == "published"


def test_nobody_listens(small_run: Callable[..., BatchRun], tmp_path: Path) -> None:
    """`quantize batch | head -1`: the run goes on, and its report tells."""
    small = small_run(**{f"job{number}": 1 for number in range(4)})
    command = [*QUANTIZE, "batch", small.recipes, "--directory", tmp_path / "batch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
    assert small.report()["counts"]["published"] == 4


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup(ignored: bool, small_run: Callable[..., BatchRun], tmp_path: Path) -> None:
    """Under nohup a hangup is nothing; else it stops the run cleanly."""
    small = small_run(**{f"job{number}": 1 for number in range(6)})
    command = f"exec {' '.join(QUANTIZE)} batch {small.recipes} --directory {tmp_path / 'batch'}"
    process = subprocess.Popen(
        ["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    events = tmp_path / "batch" / "batch.jsonl"
    batch_runs.wait_for(lambda: events.exists() and b'"start"' in events.read_bytes(), 60, "it does not start")
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == (0 if ignored else 75)
    assert (small.report()["counts"]["published"] == 6) is ignored


def test_hooks_do_not_hold_the_run_up(small_run: Callable[..., BatchRun], tmp_path: Path) -> None:
    """One that sleeps, and a reason that is larger than the kernel lets an environment be."""
    small = small_run(one=1)
    (small.recipes / "bad.yaml").write_text("".join(f"key{number}: x\n" for number in range(4000)))
    begun = time.monotonic()
    hook = f'sleep 5; printf %s "$JOB_REASON" | wc -c > {tmp_path}/length'
    process = small.start("--on-failure", hook)
    batch_runs.wait_for(lambda: small.output("one").exists(), 60, "it was not published")
    assert process.wait(60) == 1
    assert 1000 < int((tmp_path / "length").read_text()) <= 8192 and time.monotonic() - begun > 5


@pytest.mark.batch
def test_the_window_stops_what_runs(tmp_path: Path, captions: Path, small_model: Callable[[str], Path]) -> None:
    """A job that outlives its estimate ends at its unit's end, and goes on in the next window."""
    slow = BatchRun(tmp_path, tmp_path / "recipes")
    slow.recipes.mkdir()
    text = CALIBRATED.format(source=small_model("llama_tied"), output=slow.output("slow"), backend="llmcompressor",
                             scheme="fp8_dynamic", captions=captions, samples=240)  # fmt: skip
    (slow.recipes / "slow.yaml").write_text(text)
    process = slow.start("--until", datetime.fromtimestamp(time.time() + 3600).isoformat())
    batch_runs.kill_once(slow, "slow", lambda pid: os.kill(process.pid, signal.SIGTERM))
    assert process.wait(60) == 75, slow.said()
    job = slow.jobs()["slow"]
    assert (job["status"], job["class"]) == ("left", "interrupted") and job["resume"]
    assert "stopping (SIGTERM)" in slow.said()
    assert slow.start().wait(120) == 0
    assert len(slow.runs("slow")) == 2 and slow.runs("slow")[1]["done"] >= 1
    assert slow.jobs()["slow"]["status"] == "published"


@pytest.mark.batch
def test_a_job_that_is_killed_for_ever(tmp_path: Path, captions: Path, small_model: Callable[[str], Path]) -> None:
    """It does not hold the batch up: after some attempts it has failed, and the command that goes on is told."""
    doomed = BatchRun(tmp_path, tmp_path / "recipes")
    doomed.recipes.mkdir()
    text = CALIBRATED.format(source=small_model("llama_tied"), output=doomed.output("doomed"), backend="modelopt",
                             scheme="fp8", captions=captions, samples=20)  # fmt: skip
    (doomed.recipes / "doomed.yaml").write_text(text)
    fast = "import pipeline.batch.queue as q, sys; q.AGAIN = 0.1; q.KILLS = 2; from pipeline.cli import main; main()"
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", fast, "batch", doomed.recipes, "--directory", tmp_path / "batch"],
            stdout=said, stderr=said, cwd=tmp_path,
        )  # fmt: skip
    killed: set[int] = set()
    while process.poll() is None:
        for event in doomed.runs("doomed")[len(killed) :]:
            if event["pid"] not in killed:
                killed.add(event["pid"])
                batch_runs.sigkill(event["pid"])
        time.sleep(0.02)
    assert process.returncode == 1 and queue.KILLS > 2
    job = doomed.jobs()["doomed"]
    assert (job["status"], job["class"], len(job["attempts"])) == ("failed", "killed", 3)
    assert len(killed) == 3 and "SIGKILL" in job["reason"]
    assert subprocess.run([*QUANTIZE, *job["resume"].split()[1:]], cwd=tmp_path).returncode == 0
    assert doomed.output("doomed").is_dir()


@pytest.mark.mount
def test_a_full_disk_is_waited_for(mounted: Any, small_run: Callable[..., BatchRun]) -> None:
    """One job's drive is full: others go on; space comes, and it does; without, it fails in its class."""
    disk = mounted("size=400m")
    both = small_run(here=1, there=2)
    recipe = both.recipes / "there.yaml"
    recipe.write_text(recipe.read_text().replace(str(both.output("there")), str(disk / "there")))
    filler = disk / "filler"
    with filler.open("wb") as file:
        file.write(b"x" * (390 << 20))
    assert both.start("--disk-wait", "2s").wait(60) == 1
    jobs = both.jobs()
    assert jobs["here"]["status"] == "published" and "waits for space" in both.said()
    assert (jobs["there"]["status"], jobs["there"]["class"]) == ("failed", "disk")
    assert not (disk / "there").exists()
    process = both.start("--disk-wait", "1h")
    batch_runs.wait_for(lambda: both.said().count("waits for space") > 1, 60, "it does not wait")
    filler.unlink()
    assert process.wait(60) == 0, both.said()
    assert (disk / "there").is_dir()


@pytest.mark.mount
def test_the_batchs_own_drive_is_full(mounted: Any, tmp_path: Path, small_run: Callable[..., BatchRun]) -> None:
    """Ledger, logs and report have no room left in the middle of the run; the jobs, elsewhere, go on."""
    disk = mounted("size=2m")
    small = small_run(**{f"job{number}": 1 for number in range(5)})
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [*QUANTIZE, "batch", small.recipes, "--directory", disk / "batch", "--disk-wait", "1s"],
            stdout=said, stderr=said, cwd=tmp_path,
        )  # fmt: skip
    batch_runs.wait_for(lambda: small.output("job0").exists(), 60, "it does not begin")
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    status = process.wait(120)
    published = [name for name in ("job0", "job1", "job2", "job3", "job4") if small.output(name).exists()]
    assert "Traceback" not in small.said() and status in (0, 1), small.said()
    assert (disk / "filler").exists() and published
    (disk / "filler").unlink()
    again = [*QUANTIZE, "batch", small.recipes, "--directory", disk / "batch"]
    assert subprocess.run(again, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    assert all(small.output(f"job{number}").is_dir() for number in range(5))


@pytest.mark.batch
def test_memory_that_runs_out(tmp_path: Path) -> None:
    """A limit that the whole batches exceed and smaller ones do not: one retry, from the start, under another identity,
    and the report says so. The limit is of address space, put between what both were seen to take."""
    from tests.families import add_tokenizer

    source = make_plain_checkpoint(tmp_path / "source", layers=1, hidden=16, wide=30_000, vocabulary=320,
                                   config={"max_position_embeddings": 512})  # fmt: skip
    add_tokenizer(source)
    (tmp_path / "long.txt").write_text("\n".join(f"{number} " + "a word and " * 40 for number in range(100, 260)))
    hungry = BatchRun(tmp_path, tmp_path / "recipes")
    hungry.recipes.mkdir()
    recipe = hungry.recipes / "hungry.yaml"
    recipe.write_text(CALIBRATED.format(source=source, output=hungry.output("hungry"), backend="llmcompressor",
                                        scheme="fp8_dynamic", captions=tmp_path / "long.txt", samples=36))  # fmt: skip

    def peak(tokens: int) -> int:
        """Of a run alone: the most address space in kB."""
        command = [*QUANTIZE, recipe, f"output={tmp_path / str(tokens)}", f"calibration.batch_tokens={tokens}"]
        most = 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    continue
                most = max([most, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmPeak"))])
                time.sleep(0.005)
        assert process.returncode == 0
        return most

    large, small = peak(4096), peak(1024)
    assert large > small + 200_000, "the test's model is too small for a limit between"
    limit = (large + small) // 2
    batch = f"ulimit -v {limit}; exec {' '.join(QUANTIZE)} batch {hungry.recipes} --directory {tmp_path / 'batch'}"
    done = subprocess.run(["bash", "-c", batch], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    job = hungry.jobs()["hungry"]
    assert [attempt["class"] for attempt in job["attempts"]] == ["out of memory", None]
    assert job["attempts"][1]["changed"] == ["calibration.batch_tokens=1024"]
    assert "started over with batches of 1024 tokens instead of 4096" in job["notes"][0]
    runs = hungry.runs("hungry")
    assert runs[-1]["done"] == 0 and runs[-1]["identity"]["calibration.batch_tokens"] == 1024
    assert hungry.start().wait(60) == 0, "the next run knows it by its new identity"
    assert "0 to do, 1 published already" in hungry.said()


def test_status_of_nothing(tmp_path: Path, quantize: Any) -> None:
    assert_one_clear_line(quantize("batch", "--status", cwd=tmp_path), 2, "--status", "there is no batch")
    assert_one_clear_line(quantize("batch", "--status", tmp_path, cwd=tmp_path), 2, "no batch was run here")
    assert_one_clear_line(quantize("batch", "x.yaml", "--budget", "soon", cwd=tmp_path), 2, "x.yaml", "no such recipe")
