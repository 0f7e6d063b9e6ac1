"""A smoke test of a recipe: its first decoder layers and a few captions, end to end, in a temporary place.

The source's first layers and everything outside them are copied into a checkpoint of their own, which goes through the
very same run, and through vLLM. What that took, by stage, makes the estimate of the whole run. The recipe's output is
never touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.calibration.placement import import_libraries
from pipeline.checkpoint import hub
from pipeline.checkpoint.result import places
from pipeline.checkpoint.source import Checkpoint, Tensor
from pipeline.errors import DiskFull, Interrupted, PipelineError, UsageError, VerificationFailed, from_os_error
from pipeline.machine.drives import drive_space, existing, measure_read
from pipeline.model.selection import select
from pipeline.model.truncate import layer_of, layers_to_keep, truncate, truncated_config
from pipeline.plan.plan import Plan, make_plan
from pipeline.report.outcome import Estimate, Smoke
from pipeline.run import runner
from pipeline.run.estimate import estimate_from_smoke
from pipeline.run.gates import Candidate, pass_gates
from pipeline.units import size_text
from pipeline.verify.report import Report
from pipeline.verify.verify import find_environment, how_verified
from pipeline.vllm_env.worker import VllmWorker

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from pipeline.report.console import Console

LARGE_LAYER = 400 << 20  # an 8B's; a smaller layer runs more captions in the same time, and tells more of the pace
SAMPLES, MAX_LENGTH = 32, 512
GPU_SAMPLES = 4096  # a GPU runs them in the time that reading a layer takes, and few would tell nothing of its pace
MARGIN = 16 << 20  # records, file system


def smoke(recipe: Recipe, console: Console, keep: bool = False) -> Smoke:
    """Run the recipe on its first layers.

    Args:
        recipe: as the whole run would get it.
        console: what the user sees.
        keep: leave the truncated source and result where they are, to look at.

    Raises:
        PipelineError: what would stop the whole run as well; it says what became of the place.
    """
    begin = time.monotonic()
    whole = hub.resolve(recipe.model.source, recipe.model.revision, headers_only=True)
    environment = find_environment(recipe)
    # vLLM's imports take seconds, and so do the plan's and the copy
    with VllmWorker(environment).begin() if environment is not None else nullcontext() as worker:
        runner.say_imports(recipe, console)
        plan = make_plan(recipe, whole)
        refusals = []
        try:
            runner.preflight(plan)
        except PipelineError as error:
            refusals.append(error)
        parent = _parent(recipe, plan)
        _sweep(recipe, parent, console)
        layers = layers_to_keep(plan.checkpoint, plan.selection)
        kept = [tensor for tensor in plan.checkpoint.tensors.values() if layer_of(tensor, plan.selection) < layers]
        _refuse_too_little_room(parent, kept, plan)
        with _lent(recipe, parent, keep) as place:
            report, estimate = _in(place, recipe, plan, kept, worker, console)
    counts = (layers, plan.selection.layers)
    return Smoke(counts, report, estimate, tuple(refusals), place if keep else None, time.monotonic() - begin)


def _in(
    place: Path, recipe: Recipe, plan: Plan, kept: list[Tensor], worker: VllmWorker | None, console: Console
) -> tuple[Report, Estimate | None]:
    layers = layers_to_keep(plan.checkpoint, plan.selection)
    shards = {plan.checkpoint.shards[tensor.shard].name for tensor in kept}
    source = hub.complete(plan.checkpoint, sorted(shards))
    reading = _reading_rate(source)
    small = _small(recipe, place, plan, layers)
    cut = Path(small.model.source)
    nbytes = truncate(source, kept, layers, cut)
    console.say(
        f"smoke: {layers} of {plan.selection.layers} layers, {size_text(nbytes)} of {size_text(source.nbytes)}, "
        f"in {place}"
    )
    imports = (
        plan.calibration.imports + import_libraries(plan.backend.load_libraries)
        if plan.calibration is not None
        else 0.0
    )
    if worker is not None:
        worker.run([])  # until vLLM is imported: what is measured next would share the cores with that
    try:
        outcome = runner.run(small, console, announce=False)
    except VerificationFailed as error:  # it says where the result stays, which here is for `_lent` to decide
        assert error.report is not None
        return error.report, None
    assert outcome.report is not None
    report = outcome.report
    if worker is None:
        console.say(how_verified(recipe, None))
    else:
        later = "; verify: generate is for the whole run" if recipe.verify == "generate" else ""
        console.say(f"verify: load, and a short answer of the engine, in {worker.environment.name}{later}")
        loaded = small.model_copy(update={"verify": "load"})
        truncated = hub.resolve(str(cut), None)
        report = pass_gates(Candidate(outcome.output, truncated, loaded, worker, console.say, truncated=True))
    return report, estimate_from_smoke(plan, outcome, reading, imports) if report.passed else None


# --- the place ---------------------------------------------------------------------------------------


def _parent(recipe: Recipe, plan: Plan) -> Path:
    """Where scratch files go if the recipe says so, else beside the output: that drive is what the estimate is about.

    Raises:
        UsageError: it lies in the source.
    """
    wanted = recipe.runtime.work_directory
    # OUTPUT's own parents are the whole run's to make
    parent = existing(Path(wanted).expanduser() if wanted else places(recipe.output)[0].parent)
    root, target = plan.checkpoint.root.resolve(), parent.resolve()
    if target == root or root in target.parents:
        key = "runtime.work_directory" if wanted else "output"
        raise UsageError(f"{key}: {target} lies in the source {root}; the source is never written to")
    return parent


def _prefix(recipe: Recipe) -> str:
    return f".{Path(recipe.output).name}.smoke-"


def _lock_name(recipe: Recipe) -> str:
    return f".{Path(recipe.output).name}.lock"


@contextmanager
def _lent(recipe: Recipe, parent: Path, keep: bool) -> Iterator[Path]:
    """A directory below `parent`, locked, that ends with the context; what fails in it says what became of it."""
    try:
        place = Path(tempfile.mkdtemp(prefix=_prefix(recipe), dir=parent))
    except OSError as error:
        raise from_os_error(error, f"making a place for the first layers in {parent}") from None
    lock = place / _lock_name(recipe)
    held = -1
    try:
        # the name appears with the lock: a file that nobody has locked is one that somebody's end has left
        held = os.open(lock.with_suffix(".new"), os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.with_suffix(".new").rename(lock)
        yield place
    except (Interrupted, KeyboardInterrupt):
        keep = False
        raise KeyboardInterrupt from None  # there is nothing to go on from
    except OSError as error:
        told = from_os_error(error, f"trying the first layers in {place}")
        told.add_line(f"  {_left_or_removed(place, keep)}")
        raise told from None
    except PipelineError as error:
        error.add_line(f"  {_left_or_removed(place, keep)}")
        raise
    finally:
        if keep:
            lock.unlink(missing_ok=True)  # a place without one is never swept
        else:
            _remove(place, lock)
        if held >= 0:
            os.close(held)


def _left_or_removed(place: Path, keep: bool) -> str:
    return f"kept: {place}" if keep else f"{place} is removed; --keep leaves it to look at"


def _remove(place: Path, lock: Path) -> None:
    """Its lock last, so that what a kill leaves of it can be swept."""
    with suppress(OSError):
        for path in place.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path != lock:
                path.unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def _sweep(recipe: Recipe, parent: Path, console: Console) -> None:
    """Remove what killed smoke tests of this output left in `parent`: places whose lock nobody holds."""
    found: list[Path] = []
    with suppress(OSError):  # what is wrong with it is told by the next to use it
        found = [place for place in parent.iterdir() if place.name.startswith(_prefix(recipe))]
    for place in found:
        lock = place / _lock_name(recipe)
        with suppress(OSError):  # gone meanwhile, not ours to open, or held: BlockingIOError
            held = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(place, lock)
                console.say(f"removed {place}, which a killed smoke test had left behind")
            finally:
                os.close(held)


def _refuse_too_little_room(parent: Path, kept: list[Tensor], plan: Plan) -> None:
    """The copy and its result, before the first byte; hidden states are looked at by the run itself."""
    result = sum(plan.outputs[name].nbytes for tensor in kept for name in plan.actions[tensor.name].outputs)
    small = sum((plan.checkpoint.root / name).stat().st_size for name in plan.checkpoint.sidecars)
    needed = sum(tensor.nbytes for tensor in kept) + result + 2 * small + MARGIN  # small files go into both
    free = drive_space(parent).free
    if needed > free:
        key = "runtime.work_directory" if plan.recipe.runtime.work_directory else "output"
        raise DiskFull(
            f"{parent}: {size_text(free)} free, {size_text(needed)} needed for a copy of the first layers and their "
            "result",
            remedy=f"free {size_text(needed - free)}, or choose another {key}",
        )


def _reading_rate(source: Checkpoint) -> float:
    """What the source's drive gives, in bytes a second.

    The copy says nothing of it: the page cache may hold the source, and some file systems share blocks.
    """
    largest = max((shard for shard in source.shards if shard.path is not None), key=lambda shard: shard.size)
    assert largest.path is not None
    return measure_read(largest.path).speed


# --- the recipe of the first layers ------------------------------------------------------------------


def _small(recipe: Recipe, place: Path, plan: Plan, layers: int) -> Recipe:
    """The recipe itself, on the truncated source; verification in vLLM comes after it."""
    name = Path(recipe.output).name
    source = place / ("source" if name.lower() != "source" else "source-of-it")  # beside the output, and its .partial
    update: dict[str, Any] = {
        "model": recipe.model.model_copy(update={"source": str(source), "revision": None}),
        "output": str(place / name),
        "verify": "structure",
        "ignore": _ignored_there(recipe, plan, layers),
        "runtime": recipe.runtime.model_copy(update={"work_directory": None}),
        "serve": recipe.serve.model_copy(update={"gpu_memory": None}),
    }
    if recipe.calibration is not None and plan.calibration is not None:
        largest = max(layer.nbytes for layer in plan.layers)
        samples = max(SAMPLES, SAMPLES * LARGE_LAYER // largest)
        few = {
            "samples": min(
                recipe.calibration.samples, samples if plan.calibration.device.kind == "cpu" else GPU_SAMPLES
            ),
            "max_length": min(MAX_LENGTH, recipe.calibration.max_length),
        }
        update["calibration"] = recipe.calibration.model_copy(update=few)
    return recipe.model_copy(update=update)


def _ignored_there(recipe: Recipe, plan: Plan, layers: int) -> list[str]:
    """The patterns of ``ignore`` that match something in the first layers too; the plan has seen that all match."""
    first = {
        name: tensor for name, tensor in plan.checkpoint.tensors.items() if layer_of(tensor, plan.selection) < layers
    }
    cut = replace(plan.checkpoint, tensors=first, config=truncated_config(plan.checkpoint.config, layers))
    kept = []
    for pattern in recipe.ignore:
        try:
            select(cut, [pattern])
        except PipelineError:
            continue
        kept.append(pattern)
    return kept
