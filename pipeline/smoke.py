"""A smoke test of a recipe: its first decoder layers and a few captions, end to end, in a temporary place.

The source's first layers and everything outside them are copied into a checkpoint of their own, which goes through the
very same run, and through vLLM. What that took, by stage, makes the forecast of the whole run. The recipe's output is
never touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import runner
from pipeline.calibration.batches import Batches
from pipeline.checkpoint import hub
from pipeline.checkpoint.source import INDEX, Checkpoint, Tensor
from pipeline.errors import PipelineError, UsageError
from pipeline.events import read_events
from pipeline.model.selection import select, text_config
from pipeline.plan import Plan, make_plan, size_text
from pipeline.serving.server import Session
from pipeline.serving.structure import Report
from pipeline.serving.verify import verify

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.report.console import Console

LAYERS, SAMPLES, MAX_LENGTH = 2, 32, 512
GPU_SAMPLES = 4096  # a GPU runs them in the time that reading a layer takes, and few would tell nothing of its pace
CHUNK = 64 << 20


@dataclass
class Forecast:
    """What the whole run will take, from what the smoke test measured.

    Attributes:
        seconds: of the whole run, and of its parts by name.
        memory: peak of this process that was measured, and the plan's bound for the whole run, in bytes.
        disk: of the result, and of hidden states while it runs, in bytes.
        device: of the GPU's memory at most, in bytes; 0 without one.
    """

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    memory: tuple[int, int] = (0, 0)
    disk: tuple[int, int] = (0, 0)
    device: int = 0


@dataclass(frozen=True)
class Smoke:
    """How a smoke test ended.

    Attributes:
        layers: how many of how many.
        report: of the truncated result.
        forecast: None where something failed.
        refusals: why the whole run would not start; empty where it would.
        kept: where the truncated source and result were left; None where they were removed.
        seconds: of the smoke test.
    """

    layers: tuple[int, int]
    report: Report
    forecast: Forecast | None
    refusals: tuple[str, ...]
    kept: Path | None
    seconds: float


def smoke(recipe: Recipe, console: Console, keep: bool = False) -> Smoke:
    """Run the recipe on its first layers.

    Args:
        recipe: as the whole run would get it.
        console: what the user sees.
        keep: leave the truncated source and result where they are, to look at.

    Raises:
        PipelineError: what would stop the whole run as well; nothing is left behind then.
    """
    begin = time.monotonic()
    whole = hub.resolve(recipe.model.source, recipe.model.revision, headers_only=True)
    server = runner.find_server(recipe)
    # vLLM's imports take seconds, and so do the plan's and the copy
    with Session(server).begin() if server is not None else nullcontext() as session:
        plan = make_plan(recipe, whole)
        refusals = []
        try:
            runner.preflight(plan)
        except PipelineError as error:
            refusals.append(str(error))
        place = _place(recipe, plan)
        try:
            layers, report, forecast = _in(place, recipe, plan, session, console)
        finally:
            if not keep:
                shutil.rmtree(place, ignore_errors=True)
    counts = (layers, plan.selection.layers)
    return Smoke(counts, report, forecast, tuple(refusals), place if keep else None, time.monotonic() - begin)


def _in(
    place: Path, recipe: Recipe, plan: Plan, session: Session | None, console: Console
) -> tuple[int, Report, Forecast | None]:
    layers = layers_to_keep(plan)
    kept = [tensor for tensor in plan.checkpoint.tensors.values() if _layer(tensor, plan) < layers]
    shards = {plan.checkpoint.shards[tensor.shard].name for tensor in kept}
    source = hub.complete(plan.checkpoint, sorted(shards))
    copying = time.monotonic()
    nbytes = truncate(source, kept, layers, place / "source")
    copy_rate = nbytes / (time.monotonic() - copying)
    console.say(
        f"smoke: {layers} of {plan.selection.layers} layers, {size_text(nbytes)} of {size_text(source.nbytes)}, "
        f"in {place}"
    )
    outcome = runner.run(_small(recipe, place, plan, layers), console, announce=False)
    assert outcome.report is not None
    report = outcome.report
    console.say(runner.how_verified(recipe, session.server if session is not None else None))
    if session is not None:
        truncated = hub.resolve(str(place / "source"), None)
        report = verify(outcome.output, truncated, "load", session, say=console.say, engine=True)
        report.checkpoint = Path(recipe.output).name
    return layers, report, _forecast(plan, outcome, copy_rate) if report.passed else None


def _place(recipe: Recipe, plan: Plan) -> Path:
    """Where the output's drive is, since that is what the forecast is about."""
    wanted = recipe.runtime.work_directory
    parent = Path(wanted).expanduser().absolute() if wanted else runner.places(recipe)[0].parent
    while not parent.exists():  # OUTPUT's own parents are the whole run's to make
        parent = parent.parent
    root, target = plan.checkpoint.root.resolve(), parent.resolve()
    if target == root or root in target.parents:
        raise UsageError(f"output: {target} lies in the source {root}; the source is never written to")
    return Path(tempfile.mkdtemp(prefix=f".{Path(recipe.output).name}.smoke-", dir=parent))


def _small(recipe: Recipe, place: Path, plan: Plan, layers: int) -> Recipe:
    """The recipe itself, on the truncated source; verification in vLLM comes after it."""
    update: dict[str, Any] = {
        "model": recipe.model.model_copy(update={"source": str(place / "source"), "revision": None}),
        "output": str(place / Path(recipe.output).name),
        "verify": "structure",
        "ignore": _ignored_there(recipe, plan, layers),
        "runtime": recipe.runtime.model_copy(update={"work_directory": None}),
        "serve": recipe.serve.model_copy(update={"gpu_memory": None}),
    }
    if recipe.calibration is not None and plan.calibration is not None:
        device = plan.calibration.device
        few = {
            "samples": min(recipe.calibration.samples, SAMPLES if device.kind == "cpu" else GPU_SAMPLES),
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


def _forecast(plan: Plan, outcome: runner.Outcome, copy_rate: float) -> Forecast:
    """Scale what was measured: bytes by the rates seen, forwards by tokens, layers by their number.

    Reading is counted at no more than the rate of the copy from the source itself, since the truncated source was
    still in the page cache.
    """
    events = list(read_events(outcome.output / "quantize" / "events.jsonl"))
    parts: dict[str, float] = {}
    pieces = [event for event in events if event["event"] == "piece"]
    if pieces:
        span = max(event["write"][1] for event in pieces) - min(event["read"][0] for event in pieces)
        read = sum(event["bytes_read"] for event in pieces)
        rate = min(read / max(span, 1e-6), copy_rate)
        parts["weights that need no data"] = sum(piece.nbytes for piece in plan.pieces) / rate
    device = 0
    runs = [event for event in events if event["event"] == "layer"]
    if runs and plan.calibration is not None:
        last = runs[-1]  # the first one warms caches and kernels
        span_of = {stage: last[stage][1] - last[stage][0] for stage in ("load", "quantize", "write")}
        reading = last["bytes_read"] / copy_rate
        working = span_of["load"] + _forward_seconds(last, plan.calibration.batches) + span_of["quantize"]
        nbytes = sum(layer.nbytes for layer in plan.layers)
        equal = nbytes / max(1, last["bytes_read"])  # layers of this one's size
        parts["layers"] = max(reading, working, span_of["write"]) * equal
        parts["imports"] = outcome.calibrated.imports if outcome.calibrated else 0.0
        device = max(event["device_bytes"] for event in runs)
        if plan.calibration.place == "device":
            device += plan.calibration.needs.hidden
    hidden = 0
    if plan.calibration is not None:
        hidden = plan.calibration.needs.hidden * (3 if plan.calibration.place == "file" else 2)
    return Forecast(
        sum(parts.values()),
        parts,
        (outcome.totals.peak_rss_bytes, plan.peak_memory),
        (plan.output_nbytes, hidden),
        device,
    )


def _forward_seconds(last: dict[str, Any], batches: Batches) -> float:
    """All forwards of a layer: so much a batch and so much a token, from the smallest and the largest batch.

    The whole run's batches are many times larger than a smoke test's. Where batches are not timed (on a GPU, with
    nearly as many captions), the time of all of them, by tokens. A small batch and a large one say little when they are
    alike or a machine is busy: a token costs at least a third of what it cost in the largest.
    """
    timed = sorted(last.get("timed_batches") or [])
    if not timed:
        span: float = last["forward"][1] - last["forward"][0]
        return span * batches.tokens / max(1, int(last["tokens"]))
    (few, short), (many, long) = timed[0], timed[-1]
    mean = long / many
    each = (long - short) / (many - few) if many > few else mean
    each = min(max(each, mean / 3), mean)
    return float(each * batches.tokens + max(0.0, long - each * many) * len(batches.batches))
