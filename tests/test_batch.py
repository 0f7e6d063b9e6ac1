"""Batches: what is collected, forecast, remembered and decided, and small nights; twelve jobs: test_batch_night.py."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch import command, forecast, ledger, manifest
from pipeline.batch.executor import Local, how_ended
from pipeline.batch.job import Ending
from pipeline.batch.manifest import Job
from pipeline.batch.planning import Facts, Refusal, plan_all
from pipeline.batch.progress import Follower
from pipeline.errors import PipelineError, UsageError
from pipeline.machine.processes import oom_kills
from tests import nights
from tests.conftest import CALIBRATED, QUANTIZE, RECIPE, assert_one_clear_line, make_plain_checkpoint
from tests.nights import Night

# --- what a batch converts ---------------------------------------------------------------------------


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Two recipes and a manifest beside them."""
    place = tmp_path / "night"
    place.mkdir()
    for name in ("a", "b"):
        (place / f"{name}.yaml").write_text(RECIPE.format(source="s", output=f"out/{name}"))
    return place


def test_recipes_and_directories(recipes: Path) -> None:
    name, jobs = manifest.collect([str(recipes), "verify=structure"])
    assert name == "night" and [job.name for job in jobs] == ["a", "b"]
    assert all(job.overrides == ("verify=structure",) for job in jobs)
    name, jobs = manifest.collect([str(recipes / "a.yaml"), str(recipes / "b.yaml"), str(recipes / "a.yaml")])
    assert name == "a-and-2-more" and [job.name for job in jobs] == ["a", "b", "a~2"]
    assert jobs[0].command == ["quantize", str(recipes / "a.yaml")]


def test_a_manifest(recipes: Path) -> None:
    path = recipes / "fifty.yaml"
    path.write_text(
        "jobs:\n"
        "  - recipe: a.yaml\n"
        "    set: {calibration.samples: 64, ignore: [x, 're:y$'], kv_cache: none, model: {revision: '1.0'}}\n"
        "  - {recipe: a.yaml, name: other, set: {output: out/other}}\n"
        "matrix:\n"
        "  sources: [Qwen/Qwen3-VL-4B-Instruct, /models/mine/]\n"
        "  recipes: [a.yaml, b.yaml]\n"
        "  output: /nvme/{source}-{recipe}\n"
        "  set: {shard_size: 1GB}\n"
        "set: {verify: load}\n"
    )
    name, jobs = manifest.collect([str(path), "verify=generate"])
    assert name == "fifty" and [job.name for job in jobs] == [
        "a", "other", "Qwen3-VL-4B-Instruct-a", "Qwen3-VL-4B-Instruct-b", "mine-a", "mine-b",
    ]  # fmt: skip
    assert jobs[0].overrides == (
        "verify=load", "calibration.samples=64", 'ignore=["x", "re:y$"]', "kv_cache=none", 'model.revision="1.0"',
        "verify=generate",
    )  # fmt: skip
    assert jobs[5].overrides == (
        "verify=load", "shard_size=1GB", "model.source=/models/mine/", "output=/nvme/mine-b", "verify=generate",
    )  # fmt: skip
    _, beside = manifest.collect([str(recipes)])
    assert [job.name for job in beside] == ["a", "b"], "a manifest in a directory is no recipe"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("jobs:\n  - {recipe: a.yaml, outputs: x}\n", ["m.yaml:2:", "jobs[0].outputs"]),
        ("jobs: []\nmatrix: {sources: [x], recipes: []}\n", ["m.yaml:2:", "matrix.recipes", "matrix.output"]),
        ("matrix: {sources: [x, y], recipes: [a.yaml], output: /o}\n", ["must hold {source}"]),
        ("matrix: {sources: [x], recipes: [a.yaml, b.yaml], output: '/o/{source}'}\n", ["must hold {recipe}"]),
        ("jobs: 3\n", ["m.yaml:1:", "jobs"]),
        ("jobs: []\n", ["no recipe here"]),
    ],
)
def test_wrong_manifests(text: str, words: list[str], recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipes)
    Path("m.yaml").write_text(text)
    with pytest.raises(UsageError) as raised:
        manifest.collect(["m.yaml"])
    for word in words:
        assert word in str(raised.value)


def test_what_is_not_there(recipes: Path) -> None:
    for words, said in ((["nowhere.yaml"], "no such recipe"), (["verify=load"], "name recipes"), ([], "name recipes")):
        with pytest.raises(UsageError, match=said):
            manifest.collect(words)


# --- the window --------------------------------------------------------------------------------------


def test_windows() -> None:
    now = datetime(2026, 11, 21, 22, 0).timestamp()

    def end(**options: str) -> float | None:
        return command.end_of_window(command.Options(**options), now)  # type: ignore[arg-type]

    assert end() is None
    assert end(until="07:00") == datetime(2026, 11, 22, 7, 0).timestamp()
    assert end(until="22:01") == now + 60 and end(until="22:00") == now + 24 * 3600
    assert end(until="2026-11-23T07:30") == datetime(2026, 11, 23, 7, 30).timestamp()
    assert end(budget="9h") == now + 9 * 3600 and end(budget="1h30m") == now + 5400 and end(budget="45s") == now + 45
    for wrong in (
        {"until": "25:00"}, {"until": "soon"}, {"until": "2020-01-01T00:00"}, {"budget": "9"}, {"budget": "h"},
        {"budget": "9h", "until": "07:00"},
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"--until|--budget"):
            end(**wrong)


FACTS = Facts(
    text="", source="s", revision=None, to_fetch=0, backend="modelopt", scheme="fp8", kv_cache="fp8",
    verify="structure", output="/o", source_bytes=10**9, output_bytes=6 * 10**8, peak_memory=10**9, disk=7 * 10**8,
    work=None, scratch=0, read_bytes=2 * 10**8, layer_bytes=8 * 10**8, layers=10, tokens=10_000, batches=10,
    device="cpu", gpu=False, batch_tokens=4096, threads=2, done=0.0, already=False,
)  # fmt: skip


def test_forecasts_learn() -> None:
    """After one job, another of its kind, of any size, is forecast by what the machine has shown."""
    known = forecast.Forecaster()
    first = known.seconds(FACTS)
    assert first == pytest.approx(sum(forecast.rule(FACTS).values())) and not known.informed
    slow = {part: 3 * seconds for part, seconds in forecast.rule(FACTS).items()}
    known.learn(FACTS, slow)
    assert known.informed and known.seconds(FACTS) == pytest.approx(3 * first)
    large = replace(FACTS, read_bytes=10**10, layer_bytes=4 * 10**10, tokens=50_000)
    assert known.seconds(large) == pytest.approx(3 * sum(forecast.rule(large).values()))
    other = replace(FACTS, backend="llmcompressor")  # of another backend: at least that
    assert known.seconds(other) == pytest.approx(3 * sum(forecast.rule(other).values()))
    free = replace(FACTS, backend="llmcompressor", layers=0, tokens=0, layer_bytes=0, batches=0)
    assert known.seconds(free) < first, "data-free jobs import nothing, whatever calibrated ones took"
    assert known.seconds(replace(FACTS, done=0.5)) < 3 * first
    assert known.seconds(replace(FACTS, already=True)) == 0
    assert known.errors() is None
    known.judge(110, 100)
    known.judge(80, 100)
    assert known.errors() == {"jobs": 2, "median_error": pytest.approx(0.15), "worst_error": pytest.approx(0.2)}


# --- what is remembered ------------------------------------------------------------------------------


def test_the_ledger_survives(tmp_path: Path) -> None:
    """A kill in the middle of a line; a batch that runs already; a night after the night."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("x")
    jobs = [Job(name, recipe, ()) for name in ("one", "two", "three")]
    book = ledger.Ledger.open(tmp_path / "b", jobs)
    with pytest.raises(PipelineError, match="running already"):
        ledger.Ledger.open(tmp_path / "b", jobs)
    assert ledger.is_running(tmp_path / "b")
    book.begin(command="quantize batch")
    for name in ("one", "two"):
        book.start(name, ledger.Attempt(100.0, 5.0, False, ()))
    book.end("one", Ending("verification", 1, "bad", notes=["n"]))
    book.settle("one", "failed", "verification", "bad")
    book.close()
    path = tmp_path / "b" / ledger.FILE
    path.write_bytes(path.read_bytes() + b'{"event": "status", "jo')
    again = ledger.Ledger.open(tmp_path / "b", jobs)
    one, two = again.records["one"], again.records["two"]
    assert one.text != "" and one.status == "failed" and one.attempts[0].ending is not None
    assert (one.attempts[0].ending.kind, one.attempts[0].ending.notes) == ("verification", ["n"])
    assert two.status == "waiting"
    assert again.records["three"].status == "waiting" and again.began is not None
    again.begin(command="quantize batch")
    assert two.notes == ["its batch was killed while it ran"]
    again.settle("two", "published")
    again.finish(1)
    again.close()
    assert not ledger.is_running(tmp_path / "b")
    tomorrow = ledger.Ledger.open(tmp_path / "b", jobs)
    assert {name: record.status for name, record in tomorrow.records.items()} == {
        "one": "waiting", "two": "published", "three": "waiting",
    }  # fmt: skip
    assert tomorrow.began is None and tomorrow.records["one"].tonight == 1
    tomorrow.close()


def test_a_mended_recipe_has_a_new_chance(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("wrong")
    book = ledger.Ledger.open(tmp_path / "b", [Job("one", recipe, ())])
    book.begin()
    book.records["one"].changed = ("calibration.batch_tokens=1024",)
    book.settle("one", "failed", "verification", "wrong")
    book.close()
    for text, status, changed in (("wrong", "failed", ("calibration.batch_tokens=1024",)), ("mended", "waiting", ())):
        recipe.write_text(text)
        book = ledger.Ledger.open(tmp_path / "b", [Job("one", recipe, ())])
        assert (book.records["one"].status, book.records["one"].changed) == (status, changed)
        book.close()


def test_a_directory_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(PipelineError, match="no batch's directory"):
        ledger.Ledger.open(tmp_path, [])


# --- plans -------------------------------------------------------------------------------------------


def test_plans(tmp_path: Path, captions: Path, small_model: Callable[[str], Path]) -> None:
    """Facts and refusals, each for its job; places are absolute, and two jobs never share an output."""
    plain = make_plain_checkpoint(tmp_path / "plain")
    texts = {
        "good": RECIPE.format(source=plain, output=tmp_path / "o1"),
        "calibrated": CALIBRATED.format(source=small_model("qwen3_vl"), output=tmp_path / "o2", backend="modelopt",
                                        scheme="fp8", captions=captions, samples=9),
        "same": RECIPE.format(source=plain, output=tmp_path / "o1"),
        "within": RECIPE.format(source=plain, output=tmp_path / "o2" / "deeper"),
        "nothing": RECIPE.format(source=tmp_path / "nothing", output=tmp_path / "o3"),
        "wrong": "model: 3\n",
    }  # fmt: skip
    jobs = []
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        jobs.append(Job(name, tmp_path / f"{name}.yaml", ()))
    jobs.append(Job("absent", tmp_path / "absent.yaml", ()))
    found = plan_all(jobs, tmp_path)
    kinds = {name: fact.kind for name, fact in found.items() if isinstance(fact, Refusal)}
    assert kinds == {"same": "recipe", "within": "recipe", "nothing": "source", "wrong": "recipe", "absent": "recipe"}
    same = found["same"]
    assert isinstance(same, Refusal) and "output of good in this batch" in same.reason
    good, calibrated = found["good"], found["calibrated"]
    assert isinstance(good, Facts) and isinstance(calibrated, Facts)
    assert good.layers == 0 and good.tokens == 0 and not good.gpu and 0 < good.read_bytes < good.source_bytes
    assert calibrated.layers == 3 and calibrated.tokens > 0 and calibrated.gpu
    assert 0 < calibrated.read_bytes + calibrated.layer_bytes < calibrated.source_bytes, "headers are no work"
    from pipeline.recipe import recipe

    assert Path(recipe.parse(good.text).output).is_absolute() and recipe.parse(good.text).model.source == str(plain)


# --- nights ------------------------------------------------------------------------------------------


@pytest.fixture
def night(tmp_path: Path) -> Callable[..., Night]:
    """A night of data-free jobs, by name and layers."""

    def make(**jobs: int) -> Night:
        made = Night(tmp_path, tmp_path / "recipes")
        made.recipes.mkdir()
        for name, layers in jobs.items():
            source = make_plain_checkpoint(tmp_path / "sources" / name, layers=layers)
            (made.recipes / f"{name}.yaml").write_text(RECIPE.format(source=source, output=made.output(name)))
        return made

    return make


def test_a_small_night(night: Callable[..., Night], tmp_path: Path) -> None:
    """The largest first; the table before; lines, status and report after; and once more, nothing to do."""
    small = night(one=1, three=3, two=2)
    assert small.start("--on-finish", f"env | grep ^BATCH_ > {tmp_path}/hook; exit 3").wait(120) == 0
    said = small.said()
    assert said.index("three: started") < said.index("two: started") < said.index("one: started")
    assert "3 to do, 0 published already, 0 refused" in said and "forecasts after the first job" in said
    assert "ended with status 3" in said, "the hook's failure is said, and no reason to fail"
    hook = dict(line.split("=", 1) for line in (tmp_path / "hook").read_text().splitlines())
    assert hook["BATCH_PUBLISHED"] == "3" and hook["BATCH_FAILED"] == "0" and hook["BATCH_EXIT_STATUS"] == "0"
    assert Path(hook["BATCH_REPORT"]).exists()
    report = small.report()
    assert report["exit_status"] == 0 and report["counts"]["published"] == 3 and report["forecast"]["jobs"] == 2
    status = subprocess.run([*QUANTIZE, "batch", "--status", tmp_path / "night"], capture_output=True, text=True)
    assert status.returncode == 0 and status.stdout.count("published") == 3 and "ended" in status.stdout
    before = {name: (small.output(name) / "config.json").stat().st_mtime_ns for name in ("one", "two", "three")}
    assert small.start().wait(120) == 0
    assert "0 to do, 3 published already" in small.said()
    assert before == {name: (small.output(name) / "config.json").stat().st_mtime_ns for name in before}
    assert small.report()["counts"]["published"] == 3


def test_what_is_gone_is_made_again(night: Callable[..., Night]) -> None:
    import shutil

    small = night(one=1, two=2)
    assert small.start().wait(120) == 0
    shutil.rmtree(small.output("one"))
    assert small.start().wait(120) == 0
    assert small.output("one").is_dir() and "its result is gone" in small.jobs()["one"]["notes"][0]


def test_a_dry_run_starts_nothing(night: Callable[..., Night]) -> None:
    small = night(one=1)
    (small.recipes / "bad.yaml").write_text("model: x\n")
    assert small.start("--dry-run").wait(60) == 1
    assert "1 to do, 0 published already, 1 refused" in small.said() and "bad: refused (recipe)" in small.said()
    assert not (small.root / "results").exists()


def test_the_window_lets_nothing_in_that_it_would_cut(night: Callable[..., Night], tmp_path: Path) -> None:
    """Twenty gigabytes do not go through in twenty seconds, by the rough rule; the small job behind them does."""
    small = night(quick=1)
    large = nights.with_a_hole(tmp_path / "sources" / "large", 20 * 10**9)
    (small.recipes / "large.yaml").write_text(RECIPE.format(source=large, output=small.output("large")))
    assert small.start("--budget", "20s").wait(60) == 75
    jobs = small.jobs()
    assert jobs["quick"]["status"] == "published" and not jobs["large"]["attempts"]
    assert (jobs["large"]["status"], jobs["large"]["class"]) == ("left", "window")
    assert "not end within the window" in jobs["large"]["reason"] and jobs["large"]["resume"]
    assert not small.output("large").exists() and not Path(f"{small.output('large')}.partial").exists()
    (small.recipes / "large.yaml").unlink()
    assert small.start("--budget", "10m").wait(60) == 0, "tomorrow"


def test_a_job_comes_in_when_the_forecast_gets_better(night: Callable[..., Night], tmp_path: Path) -> None:
    """By a rule that is far too slow the large one does not fit; after the first job it does."""
    small = night(large=9, quick=1)
    slow = "import pipeline.batch.forecast as f; f.STREAM = 5e3; from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", slow, "batch", small.recipes, "--directory", tmp_path / "night", "--budget", "60s"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("quick: started") < done.stdout.index("large: started"), "the largest first, where it fits"


def test_a_dry_run_changes_nothing(night: Callable[..., Night], tmp_path: Path) -> None:
    """What it refuses, the night itself may find mended; what is published stays so; nobody is called."""
    import shutil

    small = night(one=1, two=2)
    shutil.move(tmp_path / "sources" / "two", tmp_path / "aside")
    assert small.start("--dry-run", "--on-failure", f"touch {tmp_path}/called").wait(60) == 1
    assert not (tmp_path / "night").exists() and not (tmp_path / "called").exists()
    shutil.move(tmp_path / "aside", tmp_path / "sources" / "two")
    assert small.start().wait(60) == 0
    before = (tmp_path / "night" / "batch.jsonl").read_bytes()
    shutil.move(tmp_path / "sources" / "two", tmp_path / "aside")
    assert small.start("--dry-run").wait(60) == 0, "a published job needs no source"
    assert (tmp_path / "night" / "batch.jsonl").read_bytes() == before
    assert small.start().wait(60) == 0 and small.jobs()["two"]["status"] == "published"


def test_nobody_listens(night: Callable[..., Night], tmp_path: Path) -> None:
    """`quantize batch | head -1`: the night goes on, and its report tells."""
    small = night(**{f"job{number}": 1 for number in range(4)})
    command = [*QUANTIZE, "batch", small.recipes, "--directory", tmp_path / "night"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
    assert small.report()["counts"]["published"] == 4


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup(ignored: bool, night: Callable[..., Night], tmp_path: Path) -> None:
    """Under nohup a hangup is nothing; else it stops the night cleanly."""
    small = night(**{f"job{number}": 1 for number in range(6)})
    command = f"exec {' '.join(QUANTIZE)} batch {small.recipes} --directory {tmp_path / 'night'}"
    process = subprocess.Popen(
        ["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    ledger_file = tmp_path / "night" / "batch.jsonl"
    nights.wait_for(lambda: ledger_file.exists() and b'"start"' in ledger_file.read_bytes(), 60, "it does not start")
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == (0 if ignored else 75)
    assert (small.report()["counts"]["published"] == 6) is ignored


def test_hooks_do_not_hold_the_night_up(night: Callable[..., Night], tmp_path: Path) -> None:
    """One that sleeps, and a reason that is larger than the kernel lets an environment be."""
    small = night(one=1)
    (small.recipes / "bad.yaml").write_text("".join(f"key{number}: x\n" for number in range(4000)))
    begun = time.monotonic()
    hook = f'sleep 5; printf %s "$JOB_REASON" | wc -c > {tmp_path}/length'
    process = small.start("--on-failure", hook)
    nights.wait_for(lambda: small.output("one").exists(), 60, "it was not published")
    assert process.wait(60) == 1
    assert 1000 < int((tmp_path / "length").read_text()) <= 8192 and time.monotonic() - begun > 5


def test_a_shared_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two on a GPU of 80 GiB take half of it each, or what the recipe allows if that is less."""
    from pipeline.batch.executor import share_gpu
    from pipeline.batch.job import Asked

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81920\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = RECIPE.format(source="s", output="o")
    asked = Asked("j", text)
    assert share_gpu(asked, 1) == asked
    assert share_gpu(asked, 2).overrides == ("runtime.device_memory=42949MB",)
    own = Asked("j", text + "runtime: {device_memory: 10GB}\n")
    assert share_gpu(own, 2) == own
    assert share_gpu(Asked("j", text + "runtime: {device_memory: 60GB}\n"), 2).overrides[-1].endswith("=42949MB")


@pytest.mark.night
def test_the_window_stops_what_runs(tmp_path: Path, captions: Path, small_model: Callable[[str], Path]) -> None:
    """A job that outlives its forecast ends at its unit's end, and goes on in the next window."""
    slow = Night(tmp_path, tmp_path / "recipes")
    slow.recipes.mkdir()
    text = CALIBRATED.format(source=small_model("llama_tied"), output=slow.output("slow"), backend="llmcompressor",
                             scheme="fp8_dynamic", captions=captions, samples=240)  # fmt: skip
    (slow.recipes / "slow.yaml").write_text(text)
    process = slow.start("--until", datetime.fromtimestamp(time.time() + 3600).isoformat())
    nights.kill_once(slow, "slow", lambda pid: os.kill(process.pid, signal.SIGTERM))
    assert process.wait(60) == 75, slow.said()
    job = slow.jobs()["slow"]
    assert (job["status"], job["class"]) == ("left", "interrupted") and job["resume"]
    assert "stopping (SIGTERM)" in slow.said()
    assert slow.start().wait(120) == 0
    assert len(slow.runs("slow")) == 2 and slow.runs("slow")[1]["done"] >= 1
    assert slow.jobs()["slow"]["status"] == "published"


@pytest.mark.night
def test_a_job_that_is_killed_for_ever(tmp_path: Path, captions: Path, small_model: Callable[[str], Path]) -> None:
    """It does not hold the batch up: after some attempts it has failed, and the command that goes on is told."""
    from pipeline.batch import queue

    doomed = Night(tmp_path, tmp_path / "recipes")
    doomed.recipes.mkdir()
    text = CALIBRATED.format(source=small_model("llama_tied"), output=doomed.output("doomed"), backend="modelopt",
                             scheme="fp8", captions=captions, samples=20)  # fmt: skip
    (doomed.recipes / "doomed.yaml").write_text(text)
    fast = "import pipeline.batch.queue as q, sys; q.AGAIN = 0.1; q.KILLS = 2; from pipeline.cli import main; main()"
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", fast, "batch", doomed.recipes, "--directory", tmp_path / "night"],
            stdout=said, stderr=said, cwd=tmp_path,
        )  # fmt: skip
    killed: set[int] = set()
    while process.poll() is None:
        for event in doomed.runs("doomed")[len(killed) :]:
            if event["pid"] not in killed:
                killed.add(event["pid"])
                nights.sigkill(event["pid"])
        time.sleep(0.02)
    assert process.returncode == 1 and queue.KILLS > 2
    job = doomed.jobs()["doomed"]
    assert (job["status"], job["class"], len(job["attempts"])) == ("failed", "killed", 3)
    assert len(killed) == 3 and "SIGKILL" in job["reason"]
    assert subprocess.run([*QUANTIZE, *job["resume"].split()[1:]], cwd=tmp_path).returncode == 0
    assert doomed.output("doomed").is_dir()


@pytest.mark.mount
def test_a_full_disk_is_waited_for(mounted: Any, night: Callable[..., Night]) -> None:
    """One job's drive is full: others go on; space comes, and it does; without, it fails in its class."""
    disk = mounted("size=400m")
    both = night(here=1, there=2)
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
    nights.wait_for(lambda: both.said().count("waits for space") > 1, 60, "it does not wait")
    filler.unlink()
    assert process.wait(60) == 0, both.said()
    assert (disk / "there").is_dir()


@pytest.mark.mount
def test_the_batchs_own_drive_is_full(mounted: Any, tmp_path: Path, night: Callable[..., Night]) -> None:
    """Ledger, logs and report have no room left in the middle of the night; the jobs, elsewhere, go on."""
    disk = mounted("size=2m")
    small = night(**{f"job{number}": 1 for number in range(5)})
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [*QUANTIZE, "batch", small.recipes, "--directory", disk / "night", "--disk-wait", "1s"],
            stdout=said, stderr=said, cwd=tmp_path,
        )  # fmt: skip
    nights.wait_for(lambda: small.output("job0").exists(), 60, "it does not begin")
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    status = process.wait(120)
    published = [name for name in ("job0", "job1", "job2", "job3", "job4") if small.output(name).exists()]
    assert "Traceback" not in small.said() and status in (0, 1), small.said()
    assert (disk / "filler").exists() and published
    (disk / "filler").unlink()
    again = [*QUANTIZE, "batch", small.recipes, "--directory", disk / "night"]
    assert subprocess.run(again, cwd=tmp_path, stdout=subprocess.DEVNULL).returncode == 0
    assert all(small.output(f"job{number}").is_dir() for number in range(5))


def test_two_large_ones_never_fill_the_disk_together(tmp_path: Path) -> None:
    """What a running job has yet to write is not free for another, although the drive says so."""
    import shutil

    free = shutil.disk_usage(tmp_path).free
    large = replace(FACTS, output=str(tmp_path / "a"), disk=int(free * 0.6), peak_memory=1)
    other = replace(large, output=str(tmp_path / "b"))
    small = replace(large, output=str(tmp_path / "c"), disk=10**6)
    here = Local()
    assert here._room(large, ()) and here._room(small, [large])
    assert not here._room(other, [large])
    assert not here._room(replace(large, disk=free), ())
    work = replace(small, work=str(tmp_path / "work"), scratch=int(free * 0.6))
    assert here._room(work, ()) and not here._room(work, [large]), "scratch files need room, too"
    here.downloading = (tmp_path, int(free * 0.6))
    assert not here._room(large, ()) and here._room(small, ()), "and so does a download"
    assert not Local().has_room(tmp_path, free)


def test_slots() -> None:
    """One job a GPU, spread; those that need none do not take one."""
    from types import SimpleNamespace

    two = Local(gpus=("0", "3"), per_gpu=2, others=1)
    wants = replace(FACTS, gpu=True)
    taken = []
    for number in range(4):
        gpu = two._slot(wants)
        assert gpu is not None
        taken.append(gpu)
        two._running[str(number)] = SimpleNamespace(gpu=gpu)  # type: ignore[assignment]
    assert taken == ["0", "3", "0", "3"] and two._slot(wants) is None
    assert two._slot(FACTS) == ""
    assert Local()._slot(wants) == "", "without a GPU it runs on the CPU"


# --- how jobs end ------------------------------------------------------------------------------------


def test_what_ran_out_of_memory() -> None:
    """However a library says it; a fault of the device is another matter."""
    from pipeline.errors import OutOfMemory, from_os_error, is_device_fault, is_out_of_memory

    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
                 "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"):  # fmt: skip
        assert is_out_of_memory(RuntimeError(text)) and not is_device_fault(RuntimeError(text))
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_device_fault(fault) and not is_out_of_memory(fault)
    assert not is_device_fault(RuntimeError("shapes differ")) and is_out_of_memory(MemoryError())
    assert isinstance(from_os_error(OSError(errno.ENOMEM, "no"), "x"), OutOfMemory)


def test_endings(tmp_path: Path) -> None:
    assert how_ended(-9, tmp_path, False).kind == "killed"
    assert how_ended(-9, tmp_path, True).kind == "out of memory"
    assert how_ended(-11, tmp_path, True).kind == "killed" and "SIGSEGV" in how_ended(-11, tmp_path, False).reason
    assert how_ended(3, tmp_path, False).kind == "crashed"
    assert how_ended(errno.ENOSPC, tmp_path, False).kind == "disk", "its ending had no room either"
    (tmp_path / "ending.json").write_text(json.dumps(asdict(Ending("disk", 1, "full"))))
    assert how_ended(1, tmp_path, False).kind == "disk"


def test_the_kernels_oom_kills_are_counted(tmp_path: Path) -> None:
    """A real one, in a control group of its own."""
    group = Path("/sys/fs/cgroup/memory/fp8-test")
    limit = "memory.limit_in_bytes"
    if not Path("/sys/fs/cgroup/memory").is_dir():
        group, limit = Path("/sys/fs/cgroup/fp8-test"), "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(30 << 20))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        before = oom_kills()
        eat = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c 'bytearray(200 << 20)'"
        process = subprocess.run(["bash", "-c", eat], capture_output=True)
        if oom_kills() == before and process.returncode != -9:
            pytest.skip("this kernel does not enforce the group's limit")
        assert process.returncode == -9 and oom_kills() > before
        assert how_ended(process.returncode, tmp_path, oom_kills() > before).kind == "out of memory"
    finally:
        group.rmdir()


def test_progress_follows_a_record(tmp_path: Path) -> None:
    """Torn lines wait for their rest; earlier attempts count as done, not as speed."""
    path = tmp_path / "out.partial" / "quantize" / "events.jsonl"
    path.parent.mkdir(parents=True)
    follower = Follower(tmp_path / "out", 1000, since=100.0)
    assert follower.now().stage == "starting"

    def write(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    def event(moment: float, name: str, **more: Any) -> str:
        return json.dumps({"time": moment, "event": name, **more}) + "\n"

    write(event(50, "run", done=0) + event(51, "piece", label="visual", bytes_read=300, rss_bytes=5))
    write(event(120, "run", done=1) + event(121, "imports"))
    now = follower.now()
    assert (now.stage, now.share, now.rate) == ("layers", 0.3, 0.0) and now.left is None
    layer = event(time.time(), "layer", label="model.layers.0", index=0, bytes_read=350, rss_bytes=7, device_bytes=9)
    write(layer[:20])
    assert follower.now().share == 0.3
    write(layer[20:])
    now = follower.now()
    assert (now.at, now.share, now.device_bytes, now.rss) == ("model.layers.0", 0.65, 9, 7) and now.rate > 0
    assert now.left is not None and now.left > 0
    write(event(time.time(), "sealed"))
    assert follower.now().stage == "verifying"


@pytest.mark.night
def test_memory_that_runs_out(tmp_path: Path) -> None:
    """A limit that the whole batches exceed and smaller ones do not: one retry, from the start, under another identity,
    and the report says so. The limit is of address space, put between what both were seen to take."""
    from tests.families import add_tokenizer

    source = make_plain_checkpoint(tmp_path / "source", layers=2, hidden=64, wide=30_000, vocabulary=320,
                                   config={"max_position_embeddings": 512})  # fmt: skip
    add_tokenizer(source)
    (tmp_path / "long.txt").write_text("\n".join(f"{number} " + "a word and " * 40 for number in range(100, 260)))
    hungry = Night(tmp_path, tmp_path / "recipes")
    hungry.recipes.mkdir()
    recipe = hungry.recipes / "hungry.yaml"
    recipe.write_text(CALIBRATED.format(source=source, output=hungry.output("hungry"), backend="llmcompressor",
                                        scheme="fp8_dynamic", captions=tmp_path / "long.txt", samples=120))  # fmt: skip

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
    batch = f"ulimit -v {limit}; exec {' '.join(QUANTIZE)} batch {hungry.recipes} --directory {tmp_path / 'night'}"
    done = subprocess.run(["bash", "-c", batch], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    job = hungry.jobs()["hungry"]
    assert [attempt["class"] for attempt in job["attempts"]] == ["out of memory", None]
    assert job["attempts"][1]["changed"] == ["calibration.batch_tokens=1024"]
    assert "started over with batches of 1024 tokens instead of 4096" in job["notes"][0]
    runs = hungry.runs("hungry")
    assert runs[-1]["done"] == 0 and runs[-1]["identity"]["calibration.batch_tokens"] == 1024
    assert hungry.start().wait(60) == 0, "the next night knows it by its new identity"
    assert "0 to do, 1 published already" in hungry.said()


def test_status_of_nothing(tmp_path: Path, quantize: Any) -> None:
    assert_one_clear_line(quantize("batch", "--status", cwd=tmp_path), 2, "--status", "there is no batch")
    assert_one_clear_line(quantize("batch", "--status", tmp_path, cwd=tmp_path), 2, "no batch was run here")
    assert_one_clear_line(quantize("batch", "x.yaml", "--budget", "soon", cwd=tmp_path), 2, "x.yaml", "no such recipe")
