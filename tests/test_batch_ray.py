"""What only a cluster can do to a job: hear nothing of it for long, and lose its node without a word."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.batch.job import JobRequest, JobResult
from pipeline.batch.manifest import Job
from pipeline.batch.planning import JobPlan, plan_all
from pipeline.recipe.recipe import recipe_yaml
from tests.batch_runs import wait_for
from tests.conftest import RECIPE, make_plain_checkpoint
from tests.ray_cluster import Cluster, skip_without_ray

pytestmark = pytest.mark.batch

QUIET = 40.0  # seconds; a connection whose keepalive pings come too often is closed after some 25


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    skip_without_ray()
    with Cluster(tmp_path / "cluster", workers=1) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            if name.startswith("RAY_"):
                patch.setenv(name, value)
        yield cluster


@contextmanager
def held(plan: JobPlan) -> Iterator[None]:
    """As if another process worked on the job's output: the job waits for its lock."""
    path = plan.partial / "quantize" / "lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_quiet_jobs_and_lost_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """A job that takes long and says nothing runs once; a job whose node is cut off comes back as killed."""
    from pipeline.batch.on_ray import RayCluster

    recipe = tmp_path / "job.yaml"
    recipe.write_text(RECIPE.format(source=make_plain_checkpoint(tmp_path / "source"), output=tmp_path / "out"))
    (plan,) = plan_all([Job("job", recipe, ())], tmp_path).values()
    assert isinstance(plan, JobPlan), plan
    executor, results = RayCluster(cluster.address), list[tuple[str, JobResult]]()

    def ended() -> bool:
        results.extend(executor.ended())
        return bool(results)

    try:
        request = JobRequest("job", recipe_yaml(plan.recipe), lock_wait=300.0, cluster=True)
        with held(plan):
            executor.start(request, plan, tmp_path / "jobs" / "job")
            wait_for(lambda: "job" in executor.progress(), 120, "it does not begin")
            time.sleep(QUIET)
        wait_for(ended, 120, "it does not end")
        ((_, result),) = results
        assert result.kind == "done" and not result.notes, "it was begun more than once"
        results.clear()
        other = replace(plan, recipe=plan.recipe.model_copy(update={"output": str(tmp_path / "other")}))
        request = replace(request, text=recipe_yaml(other.recipe))
        with held(other):
            executor.start(request, other, tmp_path / "jobs" / "job")
            wait_for(lambda: "job" in executor.progress(), 120, "it does not begin")
            cluster.nodes[1].freeze()
            wait_for(ended, 120, "the node's loss is not noticed")
        ((_, result),) = results
        assert result.kind == "killed" and "lost" in result.reason
        cluster.nodes[1].kill()
    finally:
        executor.close()
