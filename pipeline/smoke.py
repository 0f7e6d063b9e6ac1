"""A smoke test of a recipe: its first decoder layers and a few captions, end to end, in a temporary place.

The source's first layers and everything outside them are copied into a checkpoint of their own, which goes through the
very same run, and through vLLM. What that took, by stage, makes the forecast of the whole run. The recipe's output is
never touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.calibration.placement import import_libraries
from pipeline.checkpoint import hub
from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.result import places
from pipeline.checkpoint.source import INDEX, Checkpoint, Tensor
from pipeline.errors import DiskFull, Interrupted, PipelineError, UsageError, VerificationFailed, from_os_error
from pipeline.events import read_events
from pipeline.machine.drives import measure_read, nearest
from pipeline.model.selection import select
from pipeline.plan.plan import Plan, make_plan
from pipeline.report.outcome import Outcome
from pipeline.run import runner
from pipeline.serving.verify import verify
from pipeline.units import size_text
from pipeline.verify.report import Report
from pipeline.verify.structure import check_structure
from pipeline.verify.verify import find_environment, how_verified
from pipeline.vllm_env.worker import VllmWorker

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from pipeline.report.console import Console

LAYERS, SAMPLES, MAX_LENGTH = 2, 32, 512
LARGE_LAYER = 400 << 20  # an 8B's; a smaller layer runs more captions in the same time, and tells more of the pace
GPU_SAMPLES = 4096  # a GPU runs them in the time that reading a layer takes, and few would tell nothing of its pace
CHUNK = 64 << 20
MARGIN = 16 << 20  # records, file system


@dataclass
class Forecast:
    """What the whole run will take, from what the smoke test measured.

    Attributes:
        seconds: of the whole run, and of its parts by name.
        memory: peak of this process that was measured, and the plan's bound for the whole run, in bytes.
        disk: of the result, and of hidden states while it runs, in bytes.
        device: of the GPU's memory at most, in bytes; 0 without one.
        reading: bytes a second that the source's drive gives, past the page cache.
    """

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)
    disk: tuple[int, int] = (0, 0)
    device: int = 0
    reading: float = 0.0


@dataclass(frozen=True)
class Smoke:
    """How a smoke test ended.

    Attributes:
        layers: how many of how many.
        report: of the truncated result.
        forecast: None where something failed.
        refusals: what the whole run would end with before its start; empty where it would start.
        kept: where the truncated source and result were left; None where they were removed.
        seconds: of the smoke test.
    """

    layers: tuple[int, int]
    report: Report
    forecast: Forecast | None
    refusals: tuple[PipelineError, ...]
    kept: Path | None
    seconds: float


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
    server = find_environment(recipe)
    # vLLM's imports take seconds, and so do the plan's and the copy
    with VllmWorker(server).begin() if server is not None else nullcontext() as session:
        plan = make_plan(recipe, whole)
        refusals = []
        try:
            runner.preflight(plan)
        except PipelineError as error:
            refusals.append(error)
        parent = _parent(recipe, plan)
        _sweep(recipe, parent, console)
        layers = layers_to_keep(plan)
        kept = [tensor for tensor in plan.checkpoint.tensors.values() if _layer(tensor, plan) < layers]
        _refuse_too_little_room(parent, kept, plan)
        with _lent(recipe, parent, keep) as place:
            report, forecast = _in(place, recipe, plan, kept, session, console)
    counts = (layers, plan.selection.layers)
    return Smoke(counts, report, forecast, tuple(refusals), place if keep else None, time.monotonic() - begin)


def _in(
    place: Path, recipe: Recipe, plan: Plan, kept: list[Tensor], session: VllmWorker | None, console: Console
) -> tuple[Report, Forecast | None]:
    layers = layers_to_keep(plan)
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
    imports = plan.calibration.imports + import_libraries(plan.backend.name) if plan.calibration is not None else 0.0
    if session is not None:
        session.run([])  # until vLLM is imported: what is measured next would share the cores with that
    try:
        outcome = runner.run(small, console, announce=False)
    except VerificationFailed:  # it says where the result stays, which here is for `_lent` to decide
        report = check_structure(places(small)[1], hub.resolve(small.model.source, None))
        report.checkpoint = Path(recipe.output).name
        return report, None
    assert outcome.report is not None
    report = outcome.report
    if session is None:
        console.say(how_verified(recipe, None))
    else:
        later = "; verify: generate is for the whole run" if recipe.verify == "generate" else ""
        console.say(f"verify: load, and a short answer of the engine, in {session.server.name}{later}")
        truncated = hub.resolve(small.model.source, None)
        report = verify(outcome.output, truncated, "load", session, say=console.say, engine=True)
        report.checkpoint = Path(recipe.output).name
    return report, _forecast(plan, outcome, reading, imports) if report.passed else None


# --- the place ---------------------------------------------------------------------------------------


def _parent(recipe: Recipe, plan: Plan) -> Path:
    """Where scratch files go if the recipe says so, else beside the output: that drive is what the forecast is about.

    Raises:
        UsageError: it lies in the source.
    """
    wanted = recipe.runtime.work_directory
    # OUTPUT's own parents are the whole run's to make
    parent = nearest(Path(wanted).expanduser() if wanted else places(recipe)[0].parent)
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
        told.args = (f"{told}\n  {_fate(place, keep)}",)
        raise told from None
    except PipelineError as error:
        error.args = (f"{error}\n  {_fate(place, keep)}",)
        raise
    finally:
        if keep:
            lock.unlink(missing_ok=True)  # a place without one is never swept
        else:
            _remove(place, lock)
        if held >= 0:
            os.close(held)


def _fate(place: Path, keep: bool) -> str:
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
    result = sum(plan.outputs[name].nbytes for tensor in kept for name in plan.fates[tensor.name].outputs)
    small = sum((plan.checkpoint.root / name).stat().st_size for name in plan.checkpoint.sidecars)
    needed = sum(tensor.nbytes for tensor in kept) + result + 2 * small + MARGIN  # small files go into both
    free = shutil.disk_usage(parent).free
    if needed > free:
        key = "runtime.work_directory" if plan.recipe.runtime.work_directory else "output"
        raise DiskFull(
            f"{parent}: {size_text(free)} free, {size_text(needed)} needed for a copy of the first layers and their "
            f"result; free {size_text(needed - free)}, or choose another {key}"
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
    first = {name: tensor for name, tensor in plan.checkpoint.tensors.items() if _layer(tensor, plan) < layers}
    cut = replace(plan.checkpoint, tensors=first, config=truncated_config(plan.checkpoint.config, layers))
    kept = []
    for pattern in recipe.ignore:
        try:
            select(cut, [pattern])
        except PipelineError:
            continue
        kept.append(pattern)
    return kept


# --- the truncated source ----------------------------------------------------------------------------


def layers_to_keep(plan: Plan) -> int:
    """The first layers that hold every kind there is: other tensors or shapes, another attention, `LAYERS` at least.

    A vision tower that feeds the first layers (Qwen3-VL's deepstack) needs as many layers as it feeds.
    """
    stack, count = plan.selection.stack, plan.selection.layers
    kinds: dict[int, set[Any]] = {index: set() for index in range(count)}
    for tensor in plan.checkpoint.tensors.values():
        index = _layer(tensor, plan)
        if 0 <= index < count:
            kinds[index].add((tensor.name.removeprefix(f"{stack}.{index}."), tensor.shape))
    types = text_config(plan.checkpoint.config).get("layer_types") or []
    each = [(frozenset(kinds[index]), types[index] if index < len(types) else None) for index in range(count)]
    last_new = max(each.index(kind) for kind in each)
    vision = plan.checkpoint.config.get("vision_config")
    fed = len(vision.get("deepstack_visual_indexes") or []) if isinstance(vision, dict) else 0
    return min(count, max(LAYERS, last_new + 1, fed))


def _layer(tensor: Tensor, plan: Plan) -> int:
    """The decoder layer of a tensor, also beyond the last (multi-token prediction); -1 outside the stack."""
    prefix = f"{plan.selection.stack}." if plan.selection.stack else ""
    found = re.match(r"(\d+)\.", tensor.name.removeprefix(prefix)) if tensor.name.startswith(prefix) else None
    return int(found[1]) if found else -1


def truncate(checkpoint: Checkpoint, kept: list[Tensor], layers: int, target: Path) -> int:
    """Write a checkpoint of `kept` alone, with a config that says so many layers.

    Args:
        checkpoint: with its shards in place.
        kept: tensors of it.
        layers: decoder layers among them.
        target: a new directory.

    Returns:
        The bytes that were copied.
    """
    target.mkdir(parents=True)
    for name in checkpoint.sidecars:
        if name != "config.json":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.root / name, target / name)
    (target / "config.json").write_text(json.dumps(truncated_config(checkpoint.config, layers), indent=2) + "\n")
    weight_map, copied = {}, 0
    for index, shard in enumerate(checkpoint.shards):
        tensors = [tensor for tensor in kept if tensor.shard == index]
        if not tensors:
            continue
        assert shard.path is not None
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            weight_map[tensor.name] = shard.name
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (target / shard.name).open("wb", buffering=0) as out, shard.path.open("rb") as source:
            out.write(len(text).to_bytes(8, "little") + text)
            for begin, count in _runs(tensors):
                _copy(source.fileno(), out.fileno(), begin, count)
        copied += position
    if len(set(weight_map.values())) > 1 or not (target / "model.safetensors").exists():
        (target / INDEX).write_text(json.dumps({"metadata": {"total_size": copied}, "weight_map": weight_map}))
    return copied


def _runs(tensors: list[Tensor]) -> Iterator[tuple[int, int]]:
    """Neighbouring tensors as one range of the file: begin and length."""
    begin = end = tensors[0].offset
    for tensor in tensors:
        if tensor.offset != end:
            yield begin, end - begin
            begin = tensor.offset
        end = tensor.offset + tensor.nbytes
    yield begin, end - begin


def _copy(source: int, target: int, begin: int, count: int) -> None:
    """Within the kernel where the system can; a file system that shares blocks then copies nothing."""
    while count:
        size = min(CHUNK, count)
        try:
            done = os.copy_file_range(source, target, size, offset_src=begin)
        except (AttributeError, OSError):
            done = os.write(target, os.pread(source, size, begin))
        if done == 0:
            raise PipelineError("the source became shorter while it was read; start again")
        begin, count = begin + done, count - done


def truncated_config(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config with so many decoder layers: the count, and every list that has an entry a layer."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    text: Any = text_config(made)
    before = text.get("num_hidden_layers")
    text["num_hidden_layers"] = layers
    for key, value in text.items():
        if isinstance(value, list) and len(value) == before:
            text[key] = value[:layers]
        elif key in ("mlp_only_layers", "no_rope_layers_indices", "full_attention_idxs") and isinstance(value, list):
            text[key] = [index for index in value if index < layers]
    if isinstance(text.get("max_window_layers"), int):
        text["max_window_layers"] = min(text["max_window_layers"], layers)
    return made


# --- forecast ----------------------------------------------------------------------------------------


def _forecast(plan: Plan, outcome: Outcome, reading: float, imports: float) -> Forecast:
    """Scale what was measured: bytes by the rates seen, forwards by batches and tokens, layers by their number.

    Reading is counted at no more than the drive's own rate: the truncated source was still in the page cache.
    """
    events = list(read_events(outcome.output / "quantize" / "events.jsonl"))
    parts: dict[str, float] = {}
    pieces = [event for event in events if event["event"] == "piece"]
    if pieces:
        span = max(event["write"][1] for event in pieces) - min(event["read"][0] for event in pieces)
        read = sum(event["bytes_read"] for event in pieces)
        parts["weights that need no data"] = sum(piece.nbytes for piece in plan.pieces) / min(
            read / max(span, 1e-6), reading
        )
    device = hidden = 0
    runs = [event for event in events if event["event"] == "layer"]
    if runs and plan.calibration is not None:
        parts["layers"] = _layers_seconds(runs, plan, reading)
        parts["imports"] = imports
        device = max(event["device_bytes"] for event in runs)
        if plan.calibration.place == "device":
            device += plan.calibration.needs.hidden
    if plan.calibration is not None:
        hidden = plan.calibration.needs.hidden * (3 if plan.calibration.place == "file" else 2)
    return Forecast(
        sum(parts.values()),
        parts,
        (outcome.totals.peak_rss_bytes, plan.peak_memory),
        (plan.output_nbytes, hidden),
        device,
        reading,
    )


def _layers_seconds(runs: list[dict[str, Any]], plan: Plan, reading: float) -> float:
    """All layers at the pace of those like the last; what the first one took longer, for caches and kernels, once."""
    assert plan.calibration is not None
    batches, nbytes = plan.calibration.batches, runs[-1]["bytes_read"]
    # a layer takes from the end of the one before to its own: what lies between their stages counts as well
    begins = [runs[0]["load"][0], *(run["quantize"][1] for run in runs)]
    spans: list[float] = [run["quantize"][1] - begin for begin, run in zip(begins, runs, strict=False)]
    alike = [number for number, run in enumerate(runs) if run["bytes_read"] == nbytes and (number or len(runs) == 1)]
    forwards: list[float] = [runs[number]["forward"][1] - runs[number]["forward"][0] for number in alike]
    around = statistics.median(spans[number] - seconds for number, seconds in zip(alike, forwards, strict=True))
    if runs[-1].get("timed_batches"):
        timed = [runs[number]["timed_batches"] for number in alike]
        forward = forward_seconds(timed, len(batches.batches), batches.tokens)
    else:  # on a GPU, with nearly as many captions
        forward = statistics.median(forwards) * batches.tokens / max(1, int(runs[-1]["tokens"]))
    writing: float = statistics.median(runs[number]["write"][1] - runs[number]["write"][0] for number in alike)
    count = sum(layer.nbytes for layer in plan.layers) / max(1, nbytes)
    warming = max(0.0, spans[0] - statistics.median(spans[number] for number in alike))
    if runs[0]["bytes_read"] != nbytes:  # another kind of layer: it tells nothing of that
        warming = 0.0
    seconds: float = max(nbytes / reading, around + forward, writing) * count + warming
    return seconds


def forward_seconds(layers: Sequence[Sequence[tuple[int, float]]], batches: int, tokens: int) -> float:
    """The forwards of a layer over all batches: so much a batch and so much a token, neither below nothing.

    Theil and Sen's line, the median over all pairs, which a few batches that something disturbed do not turn.

    Args:
        layers: tokens and seconds of each batch, the same batches in every layer.
        batches: of the whole run.
        tokens: in all of them.
    """
    points: list[tuple[int, float]] = [
        (each[0][0], statistics.median(seconds for _, seconds in each)) for each in zip(*layers, strict=True)
    ]
    slopes = [
        (late - early) / (many - few)
        for number, (few, early) in enumerate(points)
        for many, late in points[number + 1 :]
        if many != few
    ]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    base = statistics.median(seconds - slope * count for count, seconds in points)
    if base < 0 or not slopes:  # through nothing: all of it is the tokens'
        base, slope = 0.0, statistics.median(seconds / count for count, seconds in points)
    return base * batches + slope * tokens
