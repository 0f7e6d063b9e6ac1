"""What each job of a batch needs, before any of them starts.

Plans are made in a process of their own, which imports torch and transformers once for all jobs and gives their memory
back; a job that ends this process is refused, and the others are planned in the next one.

    python -m pipeline.batch.planning JOBS.json FACTS.jsonl
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch.job import MACHINE_FIELDS
from pipeline.batch.manifest import Job
from pipeline.errors import DiskFull, OtherRun, OutOfMemory, PipelineError, TooLarge, from_os_error
from pipeline.machine.processes import die_with_parent
from pipeline.plan.calibration import Prepare, prepare

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan
    from pipeline.recipe.recipe import Recipe


@dataclass(frozen=True)
class Facts:
    """What a plan says of a job; all sizes in bytes.

    Attributes:
        text: the recipe with every default filled in and every place absolute: what will run, wherever it runs.
        source: a directory or a hub id.
        revision: the commit of a hub id.
        to_fetch: of the source, not in the cache yet.
        backend: as in the recipe.
        scheme: as in the recipe.
        kv_cache: as in the recipe.
        verify: the level; ``structure`` where no vLLM is here.
        output: absolute.
        source_bytes: of its shards.
        output_bytes: of the result's shards.
        peak_memory: the plan's bound.
        disk: what the output's drive must have for all of it.
        work: where scratch files go, if not beside the output.
        scratch: what that drive must have.
        read_bytes: of the source, outside calibrated layers.
        layer_bytes: of the source, in calibrated layers.
        layers: calibrated ones.
        tokens: of calibration.
        batches: of calibration.
        device: ``cpu`` or ``cuda``: what layers would run on here.
        gpu: it wants a GPU where there is one.
        batch_tokens: of calibration; 0 without.
        threads: that it computes with.
        done: the share of the result that a stopped run has finished.
        already: it is published, by an identical run.
    """

    text: str
    source: str
    revision: str | None
    to_fetch: int
    backend: str
    scheme: str
    kv_cache: str
    verify: str
    output: str
    source_bytes: int
    output_bytes: int
    peak_memory: int
    disk: int
    work: str | None
    scratch: int
    read_bytes: int
    layer_bytes: int
    layers: int
    tokens: int
    batches: int
    device: str
    gpu: bool
    batch_tokens: int
    threads: int
    done: float
    already: bool

    @property
    def partial(self) -> Path:
        """Where the result is made."""
        return Path(self.output + ".partial")


@dataclass(frozen=True)
class Refusal:
    """Why a job cannot run: a failure class (see `pipeline.errors`), and a text for the user."""

    kind: str
    reason: str
    output: str | None = None


Planned = Facts | Refusal


def plan_all(
    jobs: Sequence[Job],
    place: Path,
    here: bool = True,
    extra: dict[str, tuple[str, ...]] | None = None,
) -> dict[str, Planned]:
    """Plan every job.

    Args:
        jobs: of a batch.
        place: a directory for what the planning process reads, writes and says.
        here: they will run on this machine, so that its memory and drives decide.
        extra: overrides that a job was retried with, by name.
    """
    found: dict[str, Planned] = {}
    left = list(jobs)
    asked, told, log = place / "planning.json", place / "planning.jsonl", place / "planning.log"
    while left:
        rows = [
            {
                "name": job.name,
                "recipe": str(job.recipe),
                "overrides": [*job.overrides, *(extra or {}).get(job.name, ())],
            }
            for job in left
        ]
        asked.write_text(json.dumps({"parent": os.getpid(), "here": here, "jobs": rows}), encoding="utf-8")
        told.write_text("", encoding="utf-8")
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.batch.planning", str(asked), str(told)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        for line in told.read_text(encoding="utf-8").splitlines():
            found[left.pop(0).name] = _from_json(json.loads(line))
        if left:  # the process is gone: the one that it was at is to blame
            job = left.pop(0)
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            reason = f"planning it ended the planning process (status {process.returncode}); {' '.join(last)}"
            found[job.name] = Refusal("crashed", reason)
    for path in (asked, told):
        path.unlink(missing_ok=True)
    return _without_clashes(jobs, found)


def _from_json(row: dict[str, Any]) -> Planned:
    if "kind" in row:
        return Refusal(**row)
    return Facts(**row)


def _without_clashes(jobs: Sequence[Job], found: dict[str, Planned]) -> dict[str, Planned]:
    """Two jobs cannot publish the same directory, nor one within another's."""
    taken: dict[Path, str] = {}
    for job in jobs:
        facts = found[job.name]
        if not isinstance(facts, Facts):
            continue
        output = Path(facts.output)
        clash = next((taken[p] for p in (output, *output.parents) if p in taken), None)
        if clash is None:
            clash = next((name for place, name in taken.items() if output in place.parents), None)
        if clash is None:
            taken[output] = job.name
            continue
        reason = f"output: {output} is, or overlaps with, the output of {clash} in this batch; choose another"
        found[job.name] = Refusal("recipe", reason, facts.output)
    return found


# --- in the planning process -------------------------------------------------------------------------


def main(asked: str, told: str) -> None:
    """Answer for each job with a line of JSON."""
    wanted = json.loads(Path(asked).read_text(encoding="utf-8"))
    die_with_parent(wanted["parent"])
    remembered = lru_cache(maxsize=4)(prepare)  # jobs of one source often ask for the same captions
    with Path(told).open("a", encoding="utf-8") as out:
        for row in wanted["jobs"]:
            planned = _plan(Path(row["recipe"]), row["overrides"], wanted["here"], remembered)
            out.write(json.dumps(asdict(planned)) + "\n")
            out.flush()


def _plan(path: Path, overrides: list[str], here: bool, prepare: Prepare) -> Planned:
    from pipeline.recipe import recipe as recipes

    output = None
    try:
        recipe = recipes.load(path, overrides)
        output = str(Path(recipe.output).expanduser().absolute())
        return _facts(recipe, here, prepare)
    except PipelineError as error:
        return Refusal(error.kind, str(error), output)
    except OSError as error:
        refused = from_os_error(error, "planning it")
        return Refusal(refused.kind, str(refused), output)


def _facts(recipe: Recipe, here: bool, prepare: Prepare) -> Facts:
    from pipeline.checkpoint import hub
    from pipeline.machine.memory import total_memory
    from pipeline.plan.disk import disk_need
    from pipeline.plan.plan import make_plan
    from pipeline.recipe.recipe import recipe_yaml
    from pipeline.run import runner
    from pipeline.units import size_text
    from pipeline.verify.verify import find_environment

    recipe = _absolute(recipe)
    checkpoint = hub.resolve(recipe.model.source, recipe.model.revision, headers_only=True)
    free = True  # enough of it, now
    try:
        plan = make_plan(recipe if here else _anywhere(recipe), checkpoint, prepare)
    except (DiskFull, OutOfMemory):  # another process has it, or an earlier job of this batch: the job may wait
        free = False
        plan = make_plan(_anywhere(recipe, "cpu", "host"), checkpoint, prepare)
    already = False
    try:
        already = runner.preflight(plan)
    except OtherRun as error:
        already = not (here and free) and not error.begun and error.fields <= MACHINE_FIELDS
        if not already:
            raise
    except DiskFull:
        pass  # now; the batch waits for space
    except TooLarge:
        if here:
            raise
    if here and free and plan.peak_memory > (total := total_memory()):
        raise TooLarge(
            f"memory: up to {size_text(plan.peak_memory)} needed, this machine has {size_text(total)}; lower "
            "calibration.samples or runtime.threads, or set runtime.hidden_states: file"
        )
    server = find_environment(recipe)
    calibration, work = plan.calibration, recipe.runtime.work_directory
    hidden = calibration.needs.hidden * (3 if calibration.place == "file" else 2) if calibration else 0
    return Facts(
        text=recipe_yaml(recipe),
        source=recipe.model.source,
        revision=checkpoint.revision,
        to_fetch=sum(shard.size for shard in checkpoint.shards if shard.path is None),
        backend=recipe.backend,
        scheme=recipe.scheme,
        kv_cache=recipe.kv_cache,
        verify="structure" if server is None else recipe.verify,
        output=recipe.output,
        source_bytes=checkpoint.nbytes,
        output_bytes=plan.output_nbytes,
        peak_memory=plan.peak_memory,
        disk=disk_need(plan),
        work=work,
        scratch=hidden if work is not None else 0,
        read_bytes=sum(piece.nbytes for piece in plan.pieces),
        layer_bytes=sum(layer.nbytes for layer in plan.layers),
        layers=len(plan.layers),
        tokens=calibration.batches.tokens if calibration else 0,
        batches=len(calibration.batches.batches) if calibration else 0,
        device=calibration.device.kind if calibration else "cpu",
        gpu=(calibration is not None and recipe.runtime.device != "cpu")
        or (recipe.verify == "generate" and server is not None and server.build == "vllm"),
        batch_tokens=recipe.calibration.batch_tokens if calibration and recipe.calibration else 0,
        threads=plan.threads,
        done=_done(plan),
        already=already,
    )


def _absolute(recipe: Recipe) -> Recipe:
    """The same recipe for any working directory."""

    def place(text: str) -> str:
        return str(Path(text).expanduser().absolute())

    update: dict[str, Any] = {"output": place(recipe.output)}
    if Path(recipe.model.source).expanduser().exists():
        update["model"] = recipe.model.model_copy(update={"source": place(recipe.model.source)})
    if recipe.calibration is not None and Path(recipe.calibration.captions).expanduser().exists():
        update["calibration"] = recipe.calibration.model_copy(update={"captions": place(recipe.calibration.captions)})
    runtime = {
        key: place(value)
        for key in ("work_directory", "vllm_python")
        if (value := getattr(recipe.runtime, key)) is not None
    }
    if runtime:
        update["runtime"] = recipe.runtime.model_copy(update=runtime)
    return recipe.model_copy(update=update)


def _anywhere(recipe: Recipe, device: str = "auto", hidden_states: str = "auto") -> Recipe:
    """The same recipe for a machine without the GPU, or the memory, of those that it will run on."""
    update = {"device": device, "device_memory": None, "hidden_states": hidden_states}
    return recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update=update)})


def _done(plan: Plan) -> float:
    """The share of the result that a stopped run of this identity has finished."""
    from pipeline.checkpoint.result import places
    from pipeline.journal import read_identity, read_pieces

    partial = places(plan.recipe.output)[1]
    if not partial.is_dir() or read_identity(partial) != plan.identity:
        return 0.0
    try:
        pieces = read_pieces(partial) or []
    except ValueError:
        return 0.0
    return min(1.0, sum(piece.nbytes for piece in pieces) / max(1, plan.output_nbytes))


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # all is written; taking torch down would take a second
