"""One set of tests for both executors: the processes of this machine, and a real Ray cluster of two nodes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch.executor import Executor, Local
from pipeline.batch.job import Asked, Ending
from pipeline.batch.manifest import Job
from pipeline.batch.planning import Facts, plan_all
from pipeline.batch.progress import Progress
from pipeline.events import read_events
from tests.conftest import CALIBRATED, RECIPE, make_plain_checkpoint

pytestmark = pytest.mark.night


@pytest.fixture(scope="module", params=["local", "ray"])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    if request.param == "local":
        yield Local(others=2)
        return
    from tests.ray_cluster import Cluster, skip_without_ray

    skip_without_ray()
    place = tmp_path_factory.mktemp("cluster")
    with Cluster(place, workers=1, cpus=2) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            if name.startswith("RAY_"):
                patch.setenv(name, value)
        from pipeline.batch.on_ray import RayCluster

        before = signal.getsignal(signal.SIGTERM)
        made = RayCluster(cluster.address)
        assert signal.getsignal(signal.SIGTERM) is before, "Ray's own handler would leave the jobs alone"
        yield made
        made.close()


@pytest.fixture(scope="module")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory, captions: Path, small_model: Callable[[str], Path]
) -> tuple[Facts, str]:
    """The plan of a calibrated job, which takes seconds to make, and the output that its text names."""
    place = tmp_path_factory.mktemp("planned")
    text = CALIBRATED.format(source=small_model("llama_tied"), output=place / "out", backend="modelopt", scheme="fp8",
                             captions=captions, samples=20)  # fmt: skip
    (place / "slow.yaml").write_text(text)
    (facts,) = plan_all([Job("slow", place / "slow.yaml", ())], place).values()
    assert isinstance(facts, Facts), facts
    return facts, str(place / "out")


@pytest.fixture
def job(tmp_path: Path, calibrated: tuple[Facts, str]) -> Callable[..., tuple[Asked, Facts, Path]]:
    """A planned job; `slow` is calibrated, and so takes seconds."""

    def make(name: str = "job", slow: bool = False) -> tuple[Asked, Facts, Path]:
        output = tmp_path / "out" / name
        (tmp_path / "batch.jsonl").touch()  # a batch's directory, which every node can see
        if slow:
            planned, before = calibrated
            facts = replace(planned, output=str(output), text=planned.text.replace(before, str(output)))
        else:
            recipe = tmp_path / f"{name}.yaml"
            recipe.write_text(RECIPE.format(source=make_plain_checkpoint(tmp_path / f"source-{name}"), output=output))
            (found,) = plan_all([Job(name, recipe, ())], tmp_path).values()
            assert isinstance(found, Facts), found
            facts = found
        return Asked(name, facts.text, cluster=True), facts, tmp_path / "jobs" / name

    return make


def ending(executor: Executor, seconds: float = 120) -> tuple[str, Ending]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := executor.ended():
            assert len(found) == 1
            return found[0]
        time.sleep(0.05)
    raise AssertionError("it does not end")


def begun(executor: Executor, facts: Facts) -> int:
    """The process of a job that has finished its first unit."""
    journal = facts.partial / "quantize" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.01)
    runs = [event for event in read_events(facts.partial / "quantize" / "events.jsonl") if event["event"] == "run"]
    return int(runs[-1]["pid"])


def test_a_good_job(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    asked, facts, place = job()
    assert executor.refuses(facts) is None and executor.wants(facts) is None and executor.running() == 0
    executor.start(asked, facts, place)
    assert executor.running() == 1
    name, ended = ending(executor)
    assert (name, ended.kind, ended.exit_status) == ("job", "done", 0) and executor.running() == 0
    assert ended.verdict is not None and ended.verdict["passed"] and ended.peak_rss > 10**7
    assert ended.parts is not None and set(ended.parts) == {"start", "stream", "verify"}
    assert all(seconds >= 0 for seconds in ended.parts.values()) and ended.began is not None
    assert (Path(facts.output) / "config.json").exists()
    assert f"published: {facts.output}" in (place / "log.txt").read_text()
    executor.start(asked, facts, place)
    _, again = ending(executor)
    assert again.kind == "done" and again.already and again.verdict == ended.verdict


def test_a_job_that_cannot_succeed(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    """The source was planned, and is damaged since."""
    asked, facts, place = job()
    shard = max(Path(facts.source).glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 10)
    executor.start(asked, facts, place)
    _, ended = ending(executor)
    assert (ended.kind, ended.exit_status) == ("source", 1) and "truncated" in ended.reason
    assert "error: " in (place / "log.txt").read_text() and not Path(facts.output).exists()


def test_a_job_whose_process_is_killed(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    asked, facts, place = job(slow=True)
    executor.start(asked, facts, place)
    os.kill(begun(executor, facts), signal.SIGKILL)
    _, ended = ending(executor)
    assert (ended.kind, ended.exit_status) == ("killed", -9) and "SIGKILL" in ended.reason
    executor.start(asked, facts, place)
    _, ended = ending(executor)
    assert ended.kind == "done" and ended.parts is None, "of two attempts no time can be learned"


def test_a_job_beside_another(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    """Both run; the progress of each can be seen, and the fault of one does not touch the other."""
    slow, slow_facts, slow_place = job("slow", slow=True)
    quick, quick_facts, quick_place = job("quick")
    executor.start(slow, slow_facts, slow_place)
    executor.start(quick, quick_facts, quick_place)
    seen: dict[str, list[Progress]] = {"slow": [], "quick": []}
    endings: dict[str, Ending] = {}
    deadline = time.monotonic() + 120
    while len(endings) < 2 and time.monotonic() < deadline:
        for name, progress in executor.progress().items():
            seen[name].append(progress)
        endings.update(executor.ended())
        time.sleep(0.05)
    assert endings["slow"].kind == endings["quick"].kind == "done"
    stages = {progress.stage for progress in seen["slow"]}
    assert {"starting", "layers"} & stages and max(progress.share for progress in seen["slow"]) > 0
    assert all(before.share <= after.share for before, after in zip(seen["slow"], seen["slow"][1:]))


def test_jobs_that_start_too_late(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    """Where a task waits for its place, the window may be over when it starts."""
    asked, facts, place = job()
    executor.start(replace(asked, until=time.time() + 5, forecast=3600.0), facts, place)
    _, ended = ending(executor)
    assert ended.kind == "late" and not facts.partial.exists()


def test_what_another_node_began(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    """Work of a processor that rounds otherwise is started over and said; of another recipe it is left alone."""
    asked, facts, place = job(slow=True)
    executor.start(asked, facts, place)
    os.kill(begun(executor, facts), signal.SIGKILL)
    ending(executor)
    journal = facts.partial / "quantize" / "journal.jsonl"
    first, *rest = journal.read_text().splitlines()
    identity = json.loads(first)
    identity["identity"]["device"] = "NVIDIA Other"
    journal.write_text("\n".join([json.dumps(identity), *rest]) + "\n")
    executor.start(replace(asked, cluster=False), facts, place)
    _, ended = ending(executor)
    assert ended.kind == "recipe" and "device" in ended.reason
    executor.start(replace(asked, overrides=("calibration.seed=7", "calibration.samples=9")), facts, place)
    _, ended = ending(executor)
    assert ended.kind == "recipe" and "calibration.batches" in ended.reason
    executor.start(asked, facts, place)
    _, ended = ending(executor)
    assert ended.kind == "done" and any("started over" in note and "device" in note for note in ended.notes)


def test_smaller_batches_start_over_once(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    """After memory ran out: what was begun with larger batches goes; what the retry itself began goes on."""
    asked, facts, place = job(slow=True)
    executor.start(asked, facts, place)
    os.kill(begun(executor, facts), signal.SIGKILL)
    ending(executor)
    again = replace(asked, overrides=("calibration.batch_tokens=64",),
                    restarts=("calibration.batch_tokens", "calibration.batches"))  # fmt: skip
    executor.start(again, facts, place)
    journal = facts.partial / "quantize" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while b'"calibration.batch_tokens":64' not in (journal.read_bytes() if journal.exists() else b""):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(begun(executor, facts), signal.SIGKILL)
    _, ended = ending(executor)
    assert ended.kind == "killed"
    executor.start(again, facts, place)
    _, ended = ending(executor)
    assert ended.kind == "done" and not ended.notes
    runs = [e for e in read_events(Path(facts.output) / "quantize" / "events.jsonl") if e["event"] == "run"]
    assert [run["done"] for run in runs] == [0, 1]


def test_stopping(executor: Executor, job: Callable[..., tuple[Asked, Facts, Path]]) -> None:
    """Comes last: a cluster's executor that was stopped stays so."""
    asked, facts, place = job(slow=True)
    executor.start(asked, facts, place)
    begun(executor, facts)
    executor.stop()
    _, ended = ending(executor)
    assert (ended.kind, ended.exit_status) == ("interrupted", 75), ended
    events = list(read_events(facts.partial / "quantize" / "events.jsonl"))
    assert events[-1]["event"] == "interrupted", "the unit was not finished"
