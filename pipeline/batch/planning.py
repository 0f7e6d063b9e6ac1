"""Plans every job of a batch before any of them starts, so that what cannot run is refused at once.

Plans are made in a process of their own, which imports torch and transformers once for all jobs and releases their
memory when it ends. A job that crashes this process is refused, and the others are planned in the next one.

    python -m pipeline.batch.planning DIRECTORY/planning.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from pipeline.batch.manifest import Job
from pipeline.batch.worker import end_worker, read_request, start_worker
from pipeline.errors import DiskFull, OtherRun, OutOfMemory, PipelineError, TooLarge, from_os_error
from pipeline.identity import MACHINE_FIELDS
from pipeline.plan.calibration import Prepare, prepare
from pipeline.recipe.recipe import Recipe
from pipeline.run.estimate import Work

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan


@dataclass(frozen=True)
class JobPlan:
    """The part of a job's plan that a batch decides by. Sizes are in bytes.

    Attributes:
        recipe: with every default filled in and every path absolute, so that it runs the same anywhere.
        revision: the commit of a hub id.
        to_fetch: source bytes that are not in the hub's cache yet.
        work: the quantities that its time depends on.
        output_bytes: size of the result's shards.
        peak_memory: the plan's upper bound for host memory.
        disk: what the output's drive must hold for the whole run.
        scratch: what the drive of ``runtime.work_directory`` must hold.
        gpu: whether the job wants a GPU where there is one.
        threads: how many threads it computes with.
        already: an identical run has published the result.
    """

    recipe: Recipe
    revision: str | None
    to_fetch: int
    work: Work
    output_bytes: int
    peak_memory: int
    disk: int
    scratch: int
    gpu: bool
    threads: int
    already: bool

    @property
    def source(self) -> str:
        """A directory or a hub id."""
        return self.recipe.model.source

    @property
    def output(self) -> Path:
        """Where the result is published."""
        return Path(self.recipe.output)

    @property
    def partial(self) -> Path:
        """Where the result is made."""
        return Path(self.recipe.output + ".partial")

    @property
    def batch_tokens(self) -> int:
        """Tokens of a calibration batch; 0 for a job that is not calibrated."""
        return self.recipe.calibration.batch_tokens if self.work.calibrated and self.recipe.calibration else 0

    def with_work(self, **changes: Any) -> JobPlan:
        """The same plan with other quantities of work; see `Work`."""
        return replace(self, work=replace(self.work, **changes))


@dataclass(frozen=True)
class Refusal:
    """Why a job cannot run.

    Attributes:
        kind: the failure class; see `pipeline.errors`.
        reason: a text for the user.
        output: where the result would have been published, if the recipe could be read.
    """

    kind: str
    reason: str
    output: str | None = None


Planned = JobPlan | Refusal


@cache
def _plans() -> TypeAdapter[JobPlan]:
    return TypeAdapter(JobPlan)


def _to_json(planned: Planned) -> str:
    """A line by which the planning process answers for a job."""
    return json.dumps(asdict(planned) if isinstance(planned, Refusal) else _plans().dump_python(planned, mode="json"))


def _from_json(line: str) -> Planned:
    row = json.loads(line)
    return Refusal(**row) if "kind" in row else _plans().validate_python(row)


def plan_all(jobs: Sequence[Job], directory: Path, here: bool = True, fresh: bool = False) -> dict[str, Planned]:
    """Plan every job.

    Args:
        jobs: the jobs of a batch, with the overrides of their retries.
        directory: where the planning process keeps its log and its two temporary files.
        here: the jobs will run on this machine, so its memory and drives decide.
        fresh: results of other recipes will be replaced.

    Returns:
        A plan or a refusal per job, by name.
    """
    found: dict[str, Planned] = {}
    left = list(jobs)
    request, answers, log = directory / "planning.json", directory / "planning.jsonl", directory / "planning.log"
    while left:
        rows = [{"name": job.name, "recipe": str(job.recipe), "overrides": job.overrides} for job in left]
        answers.write_text("", encoding="utf-8")
        data = {"answers": str(answers), "here": here, "fresh": fresh, "jobs": rows}
        process = start_worker("pipeline.batch.planning", request, data, log)
        try:
            status = process.wait()
        finally:
            end_worker(process)
        for line in answers.read_text(encoding="utf-8").splitlines():
            found[left.pop(0).name] = _from_json(line)
        if left:  # the process crashed at the first job that it did not answer for
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            reason = f"planning it ended the planning process (status {status}); {' '.join(last)}"
            found[left.pop(0).name] = Refusal("crashed", reason)
    for path in (request, answers):
        path.unlink(missing_ok=True)
    return _without_clashes(jobs, found)


def _without_clashes(jobs: Sequence[Job], found: dict[str, Planned]) -> dict[str, Planned]:
    """Refuse jobs that would publish the directory of an earlier job, or one inside or around it."""
    taken: dict[Path, str] = {}
    for job in jobs:
        plan = found[job.name]
        if not isinstance(plan, JobPlan):
            continue
        output = plan.output
        around = (name for path, name in taken.items() if path == output or path in output.parents)
        inside = (name for path, name in taken.items() if output in path.parents)
        if (clash := next(around, None) or next(inside, None)) is None:
            taken[output] = job.name
            continue
        reason = f"output: {output} is, or overlaps with, the output of {clash} in this batch; choose another"
        found[job.name] = Refusal("recipe", reason, str(output))
    return found


# --- in the planning process -------------------------------------------------------------------------


def main(path: str) -> None:
    """Answer for each job of a request file with a line of JSON, in the file that the request names."""
    request = read_request(path)
    remembered = lru_cache(maxsize=4)(prepare)  # jobs of one source often ask for the same captions
    with Path(request["answers"]).open("a", encoding="utf-8") as out:
        for row in request["jobs"]:
            planned = _plan(Path(row["recipe"]), row["overrides"], request["here"], request["fresh"], remembered)
            out.write(_to_json(planned) + "\n")
            out.flush()


def _plan(path: Path, overrides: list[str], here: bool, fresh: bool, prepare: Prepare) -> Planned:
    from pipeline.recipe import recipe as recipes

    output = None
    try:
        recipe = recipes.load(path, overrides)
        output = str(Path(recipe.output).expanduser().absolute())
        return _job_plan(_absolute(recipe), here, fresh, prepare)
    except PipelineError as error:
        return Refusal(error.kind, str(error), output)
    except OSError as error:
        refused = from_os_error(error, "planning it")
        return Refusal(refused.kind, str(refused), output)


def _job_plan(recipe: Recipe, here: bool, fresh: bool, prepare: Prepare) -> JobPlan:
    from pipeline.checkpoint import hub
    from pipeline.plan.disk import disk_need, scratch_need
    from pipeline.plan.plan import make_plan
    from pipeline.verify.verify import find_environment

    checkpoint = hub.resolve(recipe.model.source, recipe.model.revision, headers_only=True)
    fits_now = True
    try:
        plan = make_plan(recipe if here else _anywhere(recipe), checkpoint, prepare)
    except (DiskFull, OutOfMemory):  # another process, or an earlier job of this batch, takes it now: the job may wait
        fits_now = False
        plan = make_plan(_anywhere(recipe, "cpu", "host"), checkpoint, prepare)
    already = _is_published(plan, here, fits_now, fresh)
    if here and fits_now:
        _refuse_too_large(plan)
    environment = find_environment(recipe)
    calibrates_on_gpu = plan.calibration is not None and recipe.runtime.device != "cpu"
    verifies_on_gpu = recipe.verify == "generate" and environment is not None and environment.build == "vllm"
    return JobPlan(
        recipe=recipe,
        revision=checkpoint.revision,
        to_fetch=sum(shard.size for shard in checkpoint.shards if shard.path is None),
        work=Work.of(plan, "structure" if environment is None else recipe.verify),
        output_bytes=plan.output_nbytes,
        peak_memory=plan.peak_memory,
        disk=disk_need(plan),
        scratch=scratch_need(plan) if recipe.runtime.work_directory is not None else 0,
        gpu=calibrates_on_gpu or verifies_on_gpu,
        threads=plan.threads,
        already=already,
    )


def _is_published(plan: Plan, here: bool, fits_now: bool, fresh: bool) -> bool:
    """Whether this very result is there; raises what refuses the job for good."""
    from pipeline.run import runner

    try:
        return runner.preflight(plan)
    except OtherRun as error:  # a plan for another machine differs from the published one in that machine's fields
        if (here and fits_now) or error.begun or not error.fields <= MACHINE_FIELDS:
            if not fresh:
                raise
            return runner.preflight(plan, replace=True)
        return True
    except DiskFull:
        return False  # full now; the batch waits for space
    except TooLarge:
        if here:
            raise
        return False


def _refuse_too_large(plan: Plan) -> None:
    from pipeline.machine.memory import total_memory
    from pipeline.units import size_text

    if plan.peak_memory > (total := total_memory()):
        raise TooLarge(
            f"memory: up to {size_text(plan.peak_memory)} needed, this machine has {size_text(total)}",
            remedy="lower calibration.samples or runtime.threads, or set runtime.hidden_states: file",
        )


def _absolute(recipe: Recipe) -> Recipe:
    """The same recipe for any working directory."""

    def absolute(text: str) -> str:
        return str(Path(text).expanduser().absolute())

    update: dict[str, Any] = {"output": absolute(recipe.output)}
    if Path(recipe.model.source).expanduser().exists():
        update["model"] = recipe.model.model_copy(update={"source": absolute(recipe.model.source)})
    if recipe.calibration is not None and Path(recipe.calibration.captions).expanduser().exists():
        captions = {"captions": absolute(recipe.calibration.captions)}
        update["calibration"] = recipe.calibration.model_copy(update=captions)
    paths = {key: getattr(recipe.runtime, key) for key in ("work_directory", "vllm_python")}
    runtime = {key: absolute(value) for key, value in paths.items() if value is not None}
    update["runtime"] = recipe.runtime.model_copy(update=runtime)
    return recipe.model_copy(update=update)


def _anywhere(recipe: Recipe, device: str = "auto", hidden_states: str = "auto") -> Recipe:
    """The same recipe for a machine without the GPU, or the memory, of those that it will run on."""
    update = {"device": device, "device_memory": None, "hidden_states": hidden_states}
    return recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update=update)})


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # everything is written; ending torch in order would take a second
