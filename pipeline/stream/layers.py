"""Layerwise calibration: one decoder layer at a time runs every batch, is quantized, written and released.

While layer N computes, one thread reads layer N+1 and another hashes, writes and flushes layer N-1. Each weight is
read once and each layer runs each batch once: hidden states wait in the activation cache between two layers. After a
layer the cache may be saved; a killed run goes on from the one that was saved last.

The forward is BF16 and passes values through unquantized while amax is observed, as ModelOpt's and llm-compressor's
own calibration does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from pipeline.backends.base import CalibratedBackend, Observed
from pipeline.calibration.placement import import_libraries, limit_device
from pipeline.checkpoint.layout import OutputTensor
from pipeline.checkpoint.writer import ShardWriter
from pipeline.errors import Interrupted, PipelineError
from pipeline.events import EventLog
from pipeline.journal import Journal, Saved
from pipeline.machine.memory import peak_rss_bytes, reset_peak_rss
from pipeline.plan.calibration import CalibrationPlan
from pipeline.plan.layout import LayerUnit
from pipeline.plan.plan import Plan
from pipeline.stream.compute import Compute, Span
from pipeline.stream.forward import Forward, count_expert_tokens, deterministic, return_memory, synchronize
from pipeline.stream.hidden import ActivationCache, Scratch
from pipeline.stream.layer_reader import LayerReader, RawLayer
from pipeline.stream.layer_writer import LayerWriter
from pipeline.stream.tensor_bytes import torch_dtypes
from pipeline.stream.totals import Totals

if TYPE_CHECKING:
    import threading

SAVE_SECONDS = float(os.environ.get("PIPELINE_SAVE_SECONDS", "30"))  # tests shorten it
Progress = Callable[[str, int], None]


def run_layers(plan: Plan, journal: Journal, log: EventLog, stop: threading.Event, on_progress: Progress) -> Totals:
    """Calibrate, quantize and write every decoder layer that the journal has not.

    Args:
        plan: with a calibration.
        journal: open; finished layers are skipped and new ones recorded.
        log: gets a ``layer`` event per layer.
        stop: when set, the layer under way is finished, the activation cache is saved and `Interrupted` raised.
        on_progress: called with a label and the bytes that are done since the last call, batch by batch.

    Raises:
        CalibrationError: an amax gives no usable scale; the module is named.
        SourceError: a weight is not finite, a file changed, or transformers cannot load a layer.
        Interrupted: `stop` was set before the last layer.
    """
    assert plan.calibration is not None
    todo = [layer for layer in plan.layers if layer.unit not in journal.done]
    if not todo:
        return Totals()
    imports = plan.calibration.imports + import_libraries(plan.backend.load_libraries)
    log.write("imports", seconds=round(imports, 3))
    limit_device(plan.calibration.device)
    begun = time.perf_counter()
    with deterministic(plan.threads), ShardWriter(journal.partial, plan.shards) as shards:
        totals = _calibrate(plan, plan.calibration, todo[0], journal, log, stop, on_progress, shards)
    totals.imports, totals.seconds = imports, time.perf_counter() - begun
    if len(journal.done) < plan.units:
        raise Interrupted("interrupted")
    return totals


def _calibrate(
    plan: Plan,
    calibration: CalibrationPlan,
    first_open: LayerUnit,
    journal: Journal,
    log: EventLog,
    stop: threading.Event,
    on_progress: Progress,
    shards: ShardWriter,
) -> Totals:
    """All layers, from the activation cache that was saved last on."""
    import torch

    from pipeline.model.skeleton import Skeleton

    backend = cast(CalibratedBackend, plan.backend)
    begin = time.time()
    device = torch.device(calibration.device.kind)
    scratch = Scratch(plan.recipe.output, journal.partial, plan.recipe.runtime.work_directory)
    skeleton = Skeleton.build(plan.checkpoint, plan.selection, device)
    backend.prepare(skeleton, plan.selection)
    with _activation_cache(calibration, device, scratch) as cache:
        snapshots = _Snapshots(cache, scratch, journal, log)
        forward = Forward(skeleton, calibration.batches.batches, device, cache)
        forward.embed(plan.checkpoint)
        first = snapshots.restore(first_open.index)
        log.write("skeleton", span=[begin, time.time()], first=first, place=calibration.place)
        layers = plan.layers[first:]
        compute = Compute(plan.backend, [piece for layer in layers for piece in layer.pieces])
        with (
            LayerReader(plan.checkpoint, layers, device) as reader,
            LayerWriter(shards, plan.outputs, compute, journal, plan.threads) as writer,
        ):
            one = _OneLayer(backend, plan.outputs, forward, device)
            work = _AllLayers(one, reader, writer, snapshots, journal, log, calibration.batches.tokens)
            work.run(layers, stop, on_progress)
    return Totals(
        bytes_read=reader.bytes_read, bytes_written=writer.bytes_written, units=writer.units,
        peak_rss_bytes=one.peak_rss_bytes, layers=work.layers, forwards=forward.count, replayed=work.replayed,
        reads=reader.reads, notes=snapshots.notes,
    )  # fmt: skip


def _activation_cache(calibration: CalibrationPlan, device: Any, scratch: Scratch) -> ActivationCache:
    shapes = [(batch.rows, batch.length) for batch in calibration.batches.batches]
    width = calibration.needs.hidden // (2 * calibration.batches.tokens)
    return ActivationCache(shapes, width, device, calibration.place, scratch.file("now"))


# --- all layers --------------------------------------------------------------------------------------


class _AllLayers:
    """The layers on their way from the reader through the calibration to the writer.

    Attributes:
        layers: how many ran.
        replayed: how many of them an earlier run had finished.
    """

    def __init__(
        self,
        one: _OneLayer,
        reader: LayerReader,
        writer: LayerWriter,
        snapshots: _Snapshots,
        journal: Journal,
        log: EventLog,
        tokens: int,
    ) -> None:
        self._one, self._reader, self._writer, self._snapshots = one, reader, writer, snapshots
        self._journal, self._log, self._tokens = journal, log, tokens
        self.layers = self.replayed = 0

    def run(self, layers: tuple[LayerUnit, ...], stop: threading.Event, on_progress: Progress) -> None:
        """Run, and write, these layers; with `stop`, end after the one under way, its output saved."""
        for unit, raw in zip(layers, self._reader, strict=True):
            done, last = unit.unit in self._journal.done, unit is layers[-1]
            told = self._tell_batches(unit, on_progress)
            if done:
                self._replay(unit, raw)
            else:
                self._convert(unit, raw)
            self.layers += 1
            on_progress(unit.label, unit.nbytes - told[0])
            stopping = stop.is_set() and not last
            if not done and not last and (stopping or self._snapshots.due()):
                self._writer.wait()  # what is saved speaks of layers that are on the device
                self._snapshots.save(unit.index)
            if stopping:
                break
        self._writer.wait()

    def _tell_batches(self, unit: LayerUnit, on_progress: Progress) -> list[int]:
        """Let progress move with the batches of a layer; the bytes that it was told of so far are the list's item."""
        told = [0]

        def on_batch(number: int, count: int) -> None:
            more = max(0, unit.nbytes * number // (count + 1) - told[0])  # the rest is for quantizing it
            told[0] += more
            on_progress(f"{unit.label}, batch {number} of {count}", more)

        self._one.forward.on_batch = on_batch
        return told

    def _replay(self, unit: LayerUnit, raw: RawLayer) -> None:
        """Run a layer that an earlier run finished, for what it makes of the batches alone."""
        result = self._one.run(unit, raw, finish=False)
        self._writer.wait()
        self._reader.give_back(raw)
        self.replayed += 1
        self._log_layer(unit, result.timing, replayed=True, bytes_written=0)

    def _convert(self, unit: LayerUnit, raw: RawLayer) -> None:
        result = self._one.run(unit, raw, finish=True)

        def written(nbytes: int, span: Span) -> None:
            self._reader.give_back(raw)
            result.timing["write"] = span
            self._log_layer(unit, result.timing, bytes_written=nbytes)

        self._writer.wait()
        self._writer.submit(unit, raw, result.made, result.observed.as_json(), written)

    def _log_layer(self, unit: LayerUnit, timing: dict[str, Any], **more: Any) -> None:
        begin, end = timing["forward"]
        self._log.write(
            "layer", label=unit.label, index=unit.index, **timing, bytes_read=unit.nbytes, tokens=self._tokens,
            tokens_per_s=round(self._tokens / max(end - begin, 1e-9)), rss_bytes=peak_rss_bytes(), **more,
        )  # fmt: skip


# --- one layer ---------------------------------------------------------------------------------------


@dataclass
class _Result:
    """What came of one layer.

    Attributes:
        made: by output tensor name, what the backend made of it, as tensors on the CPU.
        ranges: what was observed.
        timing: spans and memory by the names that the event ``layer`` has for them.
    """

    made: dict[str, Any] = field(default_factory=dict)
    observed: Observed = field(default_factory=Observed)
    timing: dict[str, Any] = field(default_factory=dict)


class _OneLayer:
    """Loads a layer, runs every batch through it while the backend observes, and has the backend quantize it.

    Attributes:
        peak_rss_bytes: the most memory this process had before the layer that ran last; each begins it anew.
        forward: runs the batches.
    """

    def __init__(
        self, backend: CalibratedBackend, outputs: Mapping[str, OutputTensor], forward: Forward, device: Any
    ) -> None:
        self._backend, self._outputs, self.forward, self._device = backend, outputs, forward, device
        self.peak_rss_bytes = 0

    def run(self, unit: LayerUnit, raw: RawLayer, finish: bool) -> _Result:
        """Calibrate a layer and, with `finish`, quantize it; its weights are released."""
        import torch

        result = _Result(timing={"read": raw.span})
        timing = result.timing
        self._begin_peaks()
        begin = time.time()
        layer = self.forward.load(unit.index, raw.tensors)
        timing["load"] = begin, time.time()
        tokens_of_experts = count_expert_tokens(layer)

        def forward() -> None:
            passed = self.forward.run(layer)
            timing["forward"] = passed.span
            if passed.timed:
                timing["timed_batches"] = passed.timed

        with torch.no_grad():
            with self.forward.explained(layer):
                result.observed = self._backend.calibrate(layer, forward, lambda: self.forward.probe(layer))
            result.observed.tokens_of_experts = tokens_of_experts()
            if finish:
                begin = time.time()
                result.made = self._backend.finish(layer, result.observed)
                synchronize(self._device)
                timing["quantize"] = begin, time.time()
                _refuse_unplanned(unit, result.made, self._outputs, self._backend.name)
        timing["device_bytes"] = torch.cuda.max_memory_reserved() if self._device.type == "cuda" else 0
        self.forward.drop(layer)
        return result

    def _begin_peaks(self) -> None:
        """From here on the peaks of memory are this layer's."""
        import torch

        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes())
        return_memory()
        reset_peak_rss()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def _refuse_unplanned(
    unit: LayerUnit, made: Mapping[str, Any], outputs: Mapping[str, OutputTensor], backend: str
) -> None:
    """What was planned has to be made, with its shape and dtype; a failure here is a mistake of this program."""
    dtypes = torch_dtypes()
    if missing := [name for name in unit.made if name not in made]:
        raise PipelineError(f"{missing[0]}: {backend} made no such tensor", remedy="please report it")
    for name, value in made.items():
        output = outputs.get(name)
        if output is None or (dtypes[output.dtype], output.shape) != (value.dtype, tuple(value.shape)):
            planned = "nothing" if output is None else f"{output.dtype} {list(output.shape)}"
            raise PipelineError(
                f"{name}: made as {value.dtype} {list(value.shape)}, planned as {planned}",
                remedy="please report it",
            )


# --- between two runs --------------------------------------------------------------------------------


class _Snapshots:
    """Saves the activation cache after a layer, now and then, and restores what was saved last.

    Attributes:
        notes: what could not be restored or saved, for the user.
    """

    def __init__(self, cache: ActivationCache, scratch: Scratch, journal: Journal, log: EventLog) -> None:
        self._cache, self._scratch, self._journal, self._log = cache, scratch, journal, log
        self._saved_at = time.monotonic()
        self.notes: list[str] = []

    def restore(self, first_open: int) -> int:
        """Go back to what was saved last.

        Args:
            first_open: the first layer that has to be written; what was saved after it, or a later one, is of no use.

        Returns:
            The layer that comes next; 0, and nothing changed, where nothing was saved or it is lost.
        """
        saved = self._journal.saved
        if saved is None or saved.layer >= first_open:
            return 0
        path = self._journal.partial / saved.file
        if not self._cache.load(path, saved.nbytes, saved.sha256):
            self._log.write("hidden_lost", layer=saved.layer, file=saved.file)
            self.notes.append(f"{path}: the hidden states saved there are lost; all forwards ran again")
            return 0
        return saved.layer + 1

    def due(self) -> bool:
        """Whether the last one is old enough that a kill would cost too much."""
        return time.monotonic() - self._saved_at >= SAVE_SECONDS

    def save(self, layer: int) -> None:
        """Save what `layer` made of the batches; the file before goes once the journal knows the new one."""
        begin, before = time.time(), self._journal.saved
        path = self._scratch.file(f"{layer:05d}")
        self._saved_at = time.monotonic()
        try:
            nbytes, digest = self._cache.save(path)
        except OSError as error:  # a later resume has more to replay; that is no reason to end
            self._log.write("hidden_not_saved", layer=layer, error=str(error))
            self.notes.append(f"{path}: hidden states could not be saved ({error.strerror}); a resume would replay")
            return
        self._journal.save(Saved(layer, self._scratch.relative(path), nbytes, digest))
        if before is not None and (old := self._journal.partial / before.file) != path:
            old.unlink(missing_ok=True)
        self._log.write("hidden_saved", layer=layer, bytes=nbytes, span=[begin, time.time()])
