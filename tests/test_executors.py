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
from pipeline.batch.job import JobRequest, JobResult
from pipeline.batch.manifest import Job
from pipeline.batch.planning import JobPlan, plan_all
from pipeline.batch.progress import Progress
from pipeline.events import read_events
from pipeline.recipe.recipe import recipe_yaml
from tests.conftest import CALIBRATED, RECIPE, make_plain_checkpoint

pytestmark = pytest.mark.batch

MakeJob = Callable[..., tuple[JobRequest, JobPlan, Path]]


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
def calibrated(tmp_path_factory: pytest.TempPathFactory, captions: Path, small_model: Callable[[str], Path]) -> JobPlan:
    """The plan of a calibrated job, which takes seconds to make."""
    place = tmp_path_factory.mktemp("planned")
    text = CALIBRATED.format(source=small_model("llama_tied"), output=place / "out", backend="modelopt", scheme="fp8",
                             captions=captions, samples=20)  # fmt: skip
    (place / "slow.yaml").write_text(text)
    (plan,) = plan_all([Job("slow", place / "slow.yaml", ())], place).values()
    assert isinstance(plan, JobPlan), plan
    return plan


@pytest.fixture
def job(tmp_path: Path, calibrated: JobPlan) -> MakeJob:
    """A planned job; `slow` is calibrated, and so takes seconds."""

    def make(name: str = "job", slow: bool = False) -> tuple[JobRequest, JobPlan, Path]:
        output = tmp_path / "out" / name
        (tmp_path / "batch.jsonl").touch()  # a batch's directory, which every node can see
        if slow:
            plan = replace(calibrated, recipe=calibrated.recipe.model_copy(update={"output": str(output)}))
        else:
            recipe = tmp_path / f"{name}.yaml"
            recipe.write_text(RECIPE.format(source=make_plain_checkpoint(tmp_path / f"source-{name}"), output=output))
            (found,) = plan_all([Job(name, recipe, ())], tmp_path).values()
            assert isinstance(found, JobPlan), found
            plan = found
        return JobRequest(name, recipe_yaml(plan.recipe), cluster=True), plan, tmp_path / "jobs" / name

    return make


def result(executor: Executor, seconds: float = 120) -> tuple[str, JobResult]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := executor.ended():
            assert len(found) == 1
            return found[0]
        time.sleep(0.05)
    raise AssertionError("it does not end")


def begun(executor: Executor, plan: JobPlan) -> int:
    """The process of a job that has finished its first unit."""
    journal = plan.partial / "quantize" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.01)
    runs = [event for event in read_events(plan.partial / "quantize" / "events.jsonl") if event["event"] == "run"]
    return int(runs[-1]["pid"])


def test_a_good_job(executor: Executor, job: MakeJob) -> None:
    request, plan, place = job()
    assert executor.refuses(plan) is None and executor.waits_for(plan) is None and executor.running() == 0
    executor.start(request, plan, place)
    assert executor.running() == 1
    name, ended = result(executor)
    assert (name, ended.kind, ended.exit_status) == ("job", "done", 0) and executor.running() == 0
    assert ended.verdict is not None and ended.verdict["passed"] and ended.peak_rss > 10**7
    assert ended.parts is not None and set(ended.parts) == {"start", "stream", "verify"}
    assert all(seconds >= 0 for seconds in ended.parts.values()) and ended.began is not None
    assert (plan.output / "config.json").exists()
    assert f"published: {plan.output}" in (place / "log.txt").read_text()
    executor.start(request, plan, place)
    _, again = result(executor)
    assert again.kind == "done" and again.already and again.verdict == ended.verdict


def test_a_job_that_cannot_succeed(executor: Executor, job: MakeJob) -> None:
    """The source was planned, and is damaged since."""
    request, plan, place = job()
    shard = max(Path(plan.source).glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 10)
    executor.start(request, plan, place)
    _, ended = result(executor)
    assert (ended.kind, ended.exit_status) == ("source", 1) and "truncated" in ended.reason
    assert "error: " in (place / "log.txt").read_text() and not plan.output.exists()


def test_a_job_whose_process_is_killed(executor: Executor, job: MakeJob) -> None:
    request, plan, place = job(slow=True)
    executor.start(request, plan, place)
    os.kill(begun(executor, plan), signal.SIGKILL)
    _, ended = result(executor)
    assert (ended.kind, ended.exit_status) == ("killed", -9) and "SIGKILL" in ended.reason
    executor.start(request, plan, place)
    _, ended = result(executor)
    assert ended.kind == "done" and ended.parts is None, "of two attempts no time can be learned"


def test_a_job_beside_another(executor: Executor, job: MakeJob) -> None:
    """Both run; the progress of each can be seen, and the fault of one does not touch the other."""
    slow, slow_plan, slow_place = job("slow", slow=True)
    quick, quick_plan, quick_place = job("quick")
    executor.start(slow, slow_plan, slow_place)
    executor.start(quick, quick_plan, quick_place)
    seen: dict[str, list[Progress]] = {"slow": [], "quick": []}
    results: dict[str, JobResult] = {}
    deadline = time.monotonic() + 120
    while len(results) < 2 and time.monotonic() < deadline:
        for name, progress in executor.progress().items():
            seen[name].append(progress)
        results.update(executor.ended())
        time.sleep(0.05)
    assert results["slow"].kind == results["quick"].kind == "done"
    stages = {progress.stage for progress in seen["slow"]}
    assert {"starting", "layers"} & stages and max(progress.share for progress in seen["slow"]) > 0
    assert all(before.share <= after.share for before, after in zip(seen["slow"], seen["slow"][1:]))


def test_jobs_that_start_too_late(executor: Executor, job: MakeJob) -> None:
    """Where a task waits for its place, the window may be over when it starts."""
    request, plan, place = job()
    executor.start(replace(request, until=time.time() + 5, estimate=3600.0), plan, place)
    _, ended = result(executor)
    assert ended.kind == "late" and not plan.partial.exists()


def test_what_another_node_began(executor: Executor, job: MakeJob) -> None:
    """Work of a processor that rounds otherwise is started over and said; of another recipe it is left alone."""
    request, plan, place = job(slow=True)
    executor.start(request, plan, place)
    os.kill(begun(executor, plan), signal.SIGKILL)
    result(executor)
    journal = plan.partial / "quantize" / "journal.jsonl"
    first, *rest = journal.read_text().splitlines()
    identity = json.loads(first)
    identity["identity"]["device"] = "NVIDIA Other"
    journal.write_text("\n".join([json.dumps(identity), *rest]) + "\n")
    executor.start(replace(request, cluster=False), plan, place)
    _, ended = result(executor)
    assert ended.kind == "recipe" and "processor: NVIDIA Other then" in ended.reason
    executor.start(replace(request, overrides=("calibration.seed=7", "calibration.samples=9")), plan, place)
    _, ended = result(executor)
    assert ended.kind == "recipe" and "calibration.seed: 0 then, 7 now" in ended.reason
    executor.start(request, plan, place)
    _, ended = result(executor)
    assert ended.kind == "done" and any("started over" in note and "processor" in note for note in ended.notes)


def test_smaller_batches_start_over_once(executor: Executor, job: MakeJob) -> None:
    """After memory ran out: what was begun with larger batches goes; what the retry itself began goes on."""
    request, plan, place = job(slow=True)
    executor.start(request, plan, place)
    os.kill(begun(executor, plan), signal.SIGKILL)
    result(executor)
    again = replace(request, overrides=("calibration.batch_tokens=64",),
                    restarts=("calibration.batch_tokens", "calibration.batches"))  # fmt: skip
    executor.start(again, plan, place)
    journal = plan.partial / "quantize" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while b'"calibration.batch_tokens":64' not in (journal.read_bytes() if journal.exists() else b""):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(begun(executor, plan), signal.SIGKILL)
    _, ended = result(executor)
    assert ended.kind == "killed"
    executor.start(again, plan, place)
    _, ended = result(executor)
    assert ended.kind == "done" and not ended.notes
    runs = [e for e in read_events(plan.output / "quantize" / "events.jsonl") if e["event"] == "run"]
    assert [run["done"] for run in runs] == [0, 1]


def test_stopping(executor: Executor, job: MakeJob) -> None:
    """Comes last: a cluster's executor that was stopped stays so."""
    request, plan, place = job(slow=True)
    executor.start(request, plan, place)
    begun(executor, plan)
    executor.stop()
    _, ended = result(executor)
    assert (ended.kind, ended.exit_status) == ("interrupted", 75), ended
    events = list(read_events(plan.partial / "quantize" / "events.jsonl"))
    assert events[-1]["event"] == "interrupted", "the unit was not finished"
