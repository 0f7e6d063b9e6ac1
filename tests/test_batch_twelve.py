"""Twelve jobs, of which four cannot end well, on this machine and on a Ray cluster of three nodes: the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.events import read_events
from tests import batch_runs
from tests.batch_runs import BEST, BatchRun
from tests.conftest import QUANTIZE, ROOT

pytestmark = pytest.mark.batch


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, captions: Path, small_model: Callable[[str], Path]) -> BatchRun:
    """The twelve, ended on this machine: one job is killed, then the batch itself, and the same command goes on."""
    if not (ROOT / ".venv-vllm" / "bin" / "python").exists():
        pytest.skip("no .venv-vllm: bash scripts/setup_vllm.sh makes it")
    run = batch_runs.twelve(tmp_path_factory.mktemp("local"), captions, small_model)
    hooks = (
        "--on-failure",
        f'echo "$JOB_NAME: $JOB_CLASS" >> {run.root}/failures',
        "--on-finish",
        f'echo "$BATCH_PUBLISHED of $BATCH_NAME, $BATCH_EXIT_STATUS" >> {run.root}/finished',
    )
    first = run.start(*hooks)
    batch_runs.kill_once(run, "killed", batch_runs.sigkill)
    batch_runs.wait_for(lambda: len(run.runs("killed")) > 1, 120, "the killed job was not taken up again")
    second = run.start(*hooks)
    assert second.wait(60) == 1 and "running already" in run.said()
    batch_runs.wait_for(lambda: run.output("tied").with_name("tied.partial").exists(), 120, "tied did not begin")
    first.kill()
    first.wait()
    batch_runs.wait_for(lambda: not batch_runs.job_processes(run.root), 60, "jobs outlive their batch")
    shown = subprocess.run([*QUANTIZE, "batch", "--status", run.root / "batch"], capture_output=True, text=True)
    assert shown.returncode == 0 and "not running: it was killed or stopped" in shown.stdout
    last = run.start(*hooks)
    assert last.wait(300) == 1, run.said()
    return run


def test_the_local_run(local: BatchRun) -> None:
    batch_runs.check(local)
    killed = local.jobs()["killed"]
    assert any("SIGKILL" in note and "resumed where it stopped" in note for note in killed["notes"]), killed["notes"]
    first, *_, last = local.runs("killed")
    assert first["done"] == 0 and last["done"] >= 1, "what was finished was done again"
    tied = local.jobs()["tied"]
    assert "its batch was killed while it ran" in tied["notes"] and len(tied["attempts"]) == 2


def test_finished_jobs_are_not_begun_again(local: BatchRun) -> None:
    """Each job was published by one attempt, whatever happened to the batch; the end is told once."""
    events = [json.loads(line) for line in (local.root / "batch" / "batch.jsonl").read_text().splitlines()]
    published = [e["job"] for e in events if e["event"] == "status" and e["status"] == "published"]
    assert sorted(published) == sorted(BEST)
    assert [e["again"] for e in events if e["event"] == "batch"] == [False, True]
    failures = (local.root / "failures").read_text().splitlines()
    assert sorted(failures) == sorted(f"{name}: {kind}" for name, kind in batch_runs.WORST.items())
    assert (local.root / "finished").read_text() == "8 of batch, 1\n"


def test_the_next_run_begins_where_this_one_ended(local: BatchRun) -> None:
    """The ended batch, run again, does nothing over; the failed ones get a new chance, and the fixed one is done."""
    before = {name: local.result(name) for name in BEST}
    times = {name: (local.output(name) / "config.json").stat().st_mtime_ns for name in BEST}
    fixed = local.start("serve={}")
    assert fixed.wait(300) == 1, local.said()
    jobs = local.jobs()
    assert jobs["refused-by-vllm"]["status"] == "published" and jobs["refused-by-vllm"]["verdict"]["proven_in_vllm"]
    assert {name for name, job in jobs.items() if job["status"] == "published"} == BEST | {"refused-by-vllm"}
    assert {name: (local.output(name) / "config.json").stat().st_mtime_ns for name in BEST} == times
    assert {name: local.result(name) for name in BEST} == before


def test_the_run_on_a_cluster(
    local: BatchRun, tmp_path: Path, captions: Path, small_model: Callable[[str], Path]
) -> None:
    """Three nodes; the one that is in the middle of a job is lost. Results are the local run's, byte for byte."""
    from tests.ray_cluster import Cluster, skip_without_ray

    skip_without_ray()
    run = batch_runs.twelve(tmp_path / "ray", captions, small_model)
    with Cluster(tmp_path / "cluster", workers=2) as cluster:
        process = run.start("--ray", cluster.address, env=cluster.environment)
        lost: list[str] = []

        def lose(pid: int) -> None:
            node = next(node for node in cluster.nodes[1:] if pid in node.pids())
            lost.append(node.name)
            node.kill()

        batch_runs.kill_once(run, "killed", lose)
        assert process.wait(400) == 1, run.said()
        assert not batch_runs.job_processes(run.root)
    batch_runs.check(run)
    killed = run.jobs()["killed"]
    # Ray takes it up elsewhere, or, where the other worker is busy for long, the batch starts it once more
    assert len(lost) == 1 and any("was lost" in note for note in killed["notes"]), killed["notes"]
    first, *_, last = run.runs("killed")
    assert first["done"] == 0 and last["done"] >= 1, "what was finished was done again"
    told = [*killed["notes"], *(attempt["node"] or "" for attempt in killed["attempts"])]
    addresses = {node for node in ("127.0.0.3", "127.0.0.4") if any(node in text for text in told)}
    assert len(addresses) == 2, "it went on at the other worker"
    for name in BEST:
        assert run.result(name) == local.result(name), f"{name} differs"


def test_a_cluster_is_left_in_order(tmp_path: Path, captions: Path, small_model: Callable[[str], Path]) -> None:
    """A wrong token is refused; SIGTERM stops jobs at a unit's end with 75, and the same command goes on."""
    from tests.ray_cluster import Cluster, skip_without_ray

    skip_without_ray()
    run = batch_runs.twelve(tmp_path / "ray", captions, small_model)
    for path in run.recipes.iterdir():
        if path.stem not in ("killed", "plain2", "moe"):
            path.unlink()
    with Cluster(tmp_path / "cluster", workers=1) as cluster:
        wrong = tmp_path / "wrong"
        wrong.write_text("0" * 64)
        unknown = run.start("--ray", cluster.address, env={**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(wrong)})
        assert unknown.wait(120) == 1
        assert "no Ray cluster answers" in run.said() and "Traceback" not in run.said()
        process = run.start("--ray", cluster.address, env=cluster.environment)
        batch_runs.kill_once(run, "killed", lambda pid: os.kill(process.pid, signal.SIGTERM))
        assert process.wait(120) == 75, run.said()
        assert not batch_runs.job_processes(run.root)
        jobs = run.jobs()
        assert jobs["killed"]["status"] == "left" and jobs["killed"]["class"] == "interrupted"
        events = list(read_events(Path(f"{run.output('killed')}.partial") / "quantize" / "events.jsonl"))
        assert events[-1]["event"] == "interrupted", "it was not stopped cleanly"
        again = run.start("--ray", cluster.address, env=cluster.environment)
        assert again.wait(240) == 0, run.said()
    assert len(run.runs("killed")) == 2 and run.runs("killed")[1]["done"] >= 1
