"""The layer stream: one decoder layer at a time runs every batch, is quantized, written and let go.

While layer N computes, one thread reads layer N+1 and another hashes, writes and flushes layer N-1. Each weight is
read once and each layer runs each batch once: hidden states wait between two layers on the GPU, in host memory or in
a file. After a layer they may be saved; a killed run goes on from the last ones saved.

The forward is BF16 and passes values through unquantized while ranges are collected, as ModelOpt's and
llm-compressor's own calibration does.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipeline.backends.base import CalibratedBackend, CalibrationError, Ranges
from pipeline.calibration.placement import import_libraries, limit_device
from pipeline.checkpoint.reader import announce, open_shard, read_exactly, refuse_changed
from pipeline.checkpoint.source import SourceError
from pipeline.checkpoint.writer import ShardWriter
from pipeline.errors import DeviceFault, Interrupted, OutOfMemory, PipelineError, is_device_fault, is_out_of_memory
from pipeline.events import EventLog
from pipeline.journal import Digest, Journal, Saved
from pipeline.machine.memory import peak_rss_bytes, reset_peak_rss
from pipeline.plan.layout import LayerUnit, Piece
from pipeline.plan.plan import Plan
from pipeline.stream.compute import Compute
from pipeline.stream.forward import count_expert_tokens, return_memory, settings
from pipeline.stream.hidden import HiddenStates, Scratch
from pipeline.stream.layer_reader import LayerBuffers, RawLayer, bytes_of, refuse_not_finite, torch_dtypes
from pipeline.stream.totals import Calibrated, Totals

if TYPE_CHECKING:
    import threading

    from pipeline.model.skeleton import Skeleton

SAVE_SECONDS = float(os.environ.get("PIPELINE_SAVE_SECONDS", "30"))  # tests shorten it
TIMED = 64  # batches of a layer whose seconds its event has, at most
Span = tuple[float, float]


def run_layers(
    plan: Plan,
    journal: Journal,
    log: EventLog,
    stop: threading.Event,
    on_progress: Callable[[str, int], None],
    totals: Totals,
) -> Calibrated:
    """Calibrate, quantize and write every decoder layer that the journal has not.

    Args:
        plan: with a calibration.
        journal: open; finished layers are skipped and new ones recorded.
        log: gets a ``layer`` event a layer.
        stop: when set, the layer under way is finished, the hidden states are saved and `Interrupted` raised.
        on_progress: called with a label and the bytes read, layer by layer.
        totals: of this process; added to.

    Raises:
        CalibrationError: a range gives no usable scale; the module is named.
        SourceError: a weight is not finite, a file changed, or transformers cannot load a layer.
        Interrupted: `stop` was set before the last layer.
    """
    assert plan.calibration is not None
    seen = Calibrated()
    todo = [layer for layer in plan.layers if layer.unit not in journal.done]
    if not todo:
        return seen
    seen.imports = plan.calibration.imports + import_libraries(plan.backend.name)
    log.write("imports", seconds=round(seen.imports, 3))
    limit_device(plan.calibration.device)
    begun = time.perf_counter()
    with settings(plan), ShardWriter(journal.partial, plan.shards) as writer:
        _Stream(plan, journal, log, stop, on_progress, totals, seen, writer).run(todo[0])
    totals.seconds += time.perf_counter() - begun
    if len(journal.done) < plan.units:
        raise Interrupted("interrupted")
    return seen


class _Stream:
    """One call of `run_layers`."""

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        log: EventLog,
        stop: threading.Event,
        on_progress: Callable[[str, int], None],
        totals: Totals,
        seen: Calibrated,
        writer: ShardWriter,
    ) -> None:
        import torch

        assert plan.calibration is not None and isinstance(plan.backend, CalibratedBackend)
        self.plan, self.calibration, self.backend = plan, plan.calibration, plan.backend
        self.journal, self.log, self.stop, self.writer = journal, log, stop, writer
        self.on_progress, self.totals, self.seen = on_progress, totals, seen
        self.device = torch.device(self.calibration.device.kind)
        self.compute = Compute(plan, [piece for layer in plan.layers for piece in layer.pieces])
        self.buffers = LayerBuffers(plan.layers, self.device)
        self.scratch = Scratch(plan, journal.partial)
        self.saved_at = time.monotonic()

    def run(self, first_open: LayerUnit) -> None:
        """All layers from the last saved hidden states on."""
        from pipeline.model.skeleton import Skeleton

        begin = time.time()
        skeleton = Skeleton.build(self.plan.checkpoint, self.plan.selection, self.device)
        self.backend.prepare(skeleton, self.plan.selection)
        hidden = HiddenStates(self.plan, self.device, self.scratch)
        try:
            calls = self._embed(skeleton, hidden)
            first = self._restore(hidden, first_open.index)
            self.log.write("skeleton", span=[begin, time.time()], first=first, place=self.calibration.place)
            with (
                ThreadPoolExecutor(1, thread_name_prefix="read") as reader,
                ThreadPoolExecutor(1, thread_name_prefix="write") as behind,
                ThreadPoolExecutor(self.plan.threads, thread_name_prefix="quantize") as pool,
            ):
                try:
                    self._pass(self.plan.layers[first:], skeleton, hidden, calls, reader, behind, pool)
                finally:
                    self.buffers.close()
        finally:
            hidden.close()

    def _pass(
        self,
        layers: tuple[LayerUnit, ...],
        skeleton: Skeleton,
        hidden: HiddenStates,
        calls: list[list[dict[str, Any]]],
        reader: ThreadPoolExecutor,
        behind: ThreadPoolExecutor,
        pool: ThreadPoolExecutor,
    ) -> None:
        ahead = reader.submit(self._read, layers[0])
        writing: Future[None] | None = None
        for position, unit in enumerate(layers):
            raw, read = ahead.result()
            last = position + 1 == len(layers)
            if not last:
                ahead = reader.submit(self._read, layers[position + 1])
            done = unit.unit in self.journal.done
            made, ranges, timing = self._one(unit, raw, skeleton, hidden, calls, done)
            timing["read"] = read
            self.seen.layers += 1
            if writing is not None:
                writing.result()
            if done:
                self.seen.replayed += 1
                self.buffers.give_back(raw)
                self._log_layer(unit, timing, {"replayed": True, "bytes_written": 0})
            else:
                writing = behind.submit(self._write, unit, raw, made, ranges, timing, pool)
            del made
            self.on_progress(unit.label, unit.nbytes)
            stopping = self.stop.is_set() and not last
            if not done and not last and (stopping or time.monotonic() - self.saved_at >= SAVE_SECONDS):
                assert writing is not None
                writing.result()  # what is saved speaks of layers that are on the device
                self._save(hidden, unit)
            if stopping:
                break
        if writing is not None:
            writing.result()

    # --- one layer ---

    def _one(
        self,
        unit: LayerUnit,
        raw: RawLayer,
        skeleton: Skeleton,
        hidden: HiddenStates,
        calls: list[list[dict[str, Any]]],
        done: bool,
    ) -> tuple[dict[str, Any], Ranges, dict[str, Any]]:
        """Load, run, and, where an earlier run has not done so already, quantize a layer."""
        import torch

        timing: dict[str, Any] = {}
        self.totals.peak_rss_bytes = max(self.totals.peak_rss_bytes, peak_rss_bytes())
        return_memory()
        reset_peak_rss()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.time()
        layer = skeleton.load_layer(unit.index, raw.tensors)
        self._wait()
        timing["load"] = (begin, time.time())
        counts = count_expert_tokens(layer)

        finite = torch.ones((), dtype=torch.bool, device=self.device)
        batches = self.calibration.batches.batches
        by_tokens = sorted(range(len(batches)), key=lambda number: batches[number].tokens)
        # a GPU computes while this goes on; many batches are timed as well by some of all sizes
        step = -(-len(batches) // TIMED)
        timed = {*by_tokens[::step], by_tokens[-1]} if self.device.type == "cpu" else set()

        def run(number: int) -> Any:
            result = layer.module(hidden.take(number), **calls[number][unit.index])
            return result[0] if isinstance(result, tuple) else result

        def forward() -> None:
            start = time.time()
            for number in range(len(calls)):
                began = time.time()
                result = run(number)
                finite.logical_and_(result.isfinite().all())
                hidden.put(number, result)
                self.seen.forwards += 1
                if number in timed:
                    seconds = round(time.time() - began, 6)
                    timing.setdefault("timed_batches", []).append((batches[number].tokens, seconds))
            self._wait()
            timing["forward"] = (start, time.time())
            if not bool(finite):
                raise CalibrationError(
                    f"{unit.label}: what it computes is not finite; its weights are damaged, or overflow in BF16"
                )

        made: dict[str, Any] = {}
        with torch.no_grad():
            try:
                ranges = self.backend.calibrate(layer, forward, lambda: run(len(calls) - 1))
            except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise OutOfMemory(
                        f"{unit.label}: memory of {self.device.type} ran out with this layer and "
                        f"{batches[by_tokens[-1]].tokens} tokens at once",
                        remedy="free some, lower calibration.batch_tokens, or use another runtime.device",
                    ) from None
                text = (str(error).strip().splitlines() or [""])[0][:200]
                if is_device_fault(error):
                    raise DeviceFault(
                        f"{unit.label}: the GPU failed ({text})",
                        remedy="look at its health (dmesg, nvidia-smi -q), then run the same command again to go on",
                    ) from error
                raise PipelineError(
                    f"{unit.label}: transformers cannot run this layer ({type(error).__name__}: {text})",
                    remedy="does config.json belong to these weights?",
                ) from error
            ranges.tokens_of_experts = counts()
            if not done:
                begin = time.time()
                made = self.backend.finish(layer, ranges)
                self._wait()
                timing["quantize"] = (begin, time.time())
                _check_made(unit, made, self.plan)
        timing["device_bytes"] = torch.cuda.max_memory_reserved() if self.device.type == "cuda" else 0
        skeleton.drop_layer(unit.index)
        return made, ranges, timing

    def _wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    # --- reading ---

    def _read(self, unit: LayerUnit) -> tuple[RawLayer, Span]:
        """Read a layer's tensors, each once, and look for NaN and Inf in them."""
        raw = self.buffers.take()
        begin = time.time()
        order = sorted(unit.tensors, key=lambda tensor: (tensor.shard, tensor.offset))
        for index in dict.fromkeys(tensor.shard for tensor in order):
            shard = self.plan.checkpoint.shards[index]
            file = open_shard(shard)
            try:
                here = [tensor for tensor in order if tensor.shard == index]
                for tensor in here:
                    announce(file, tensor.offset, tensor.nbytes)
                for tensor in here:
                    view = raw.add(tensor)
                    read_exactly(file, shard, tensor.name, tensor.offset, view)
                    self.seen.reads[tensor.name] += 1
                    if tensor.name.endswith((".weight", ".bias", "_proj")):  # a mask in a buffer may well hold -Inf
                        refuse_not_finite(tensor, view)
            finally:
                os.close(file)
            refuse_changed(shard)
        self.totals.bytes_read += unit.nbytes
        return raw, (begin, time.time())

    # --- writing ---

    def _write(
        self,
        unit: LayerUnit,
        raw: RawLayer,
        made: dict[str, Any],
        ranges: Ranges,
        timing: dict[str, Any],
        pool: ThreadPoolExecutor,
    ) -> None:
        """Put a finished layer into the shards, flush, record it."""
        begin = time.time()

        def compute(piece: Piece) -> list[Digest]:
            data, used = self.compute.result(piece, raw.view(piece))
            digests = [
                self._put(write.tensor, write.offset, data[write.start : write.start + write.nbytes])
                for write in piece.writes
                if write.tensor not in made  # what balancing changed is the backend's
            ]
            self.compute.give_back(used)
            return digests

        def put(name: str) -> list[Digest]:
            return [self._put(name, self.plan.outputs[name].offset, bytes_of(made[name]))]

        futures = [pool.submit(compute, piece) for piece in unit.pieces] + [pool.submit(put, name) for name in made]
        digests = [digest for future in futures for digest in future.result()]
        self.writer.flush()
        self.journal.finish(unit.unit, digests, ranges.as_json())
        self.buffers.give_back(raw)
        written = sum(digest.nbytes for digest in digests)
        timing["write"] = (begin, time.time())
        self._log_layer(unit, timing, {"bytes_written": written})
        self.totals.units += 1
        self.totals.bytes_written += written

    def _put(self, name: str, offset: int, data: memoryview) -> Digest:
        self.writer.write(self.plan.outputs[name].shard, offset, data)
        return Digest(name, offset, len(data), hashlib.sha256(data).hexdigest())

    def _log_layer(self, unit: LayerUnit, timing: dict[str, Any], more: dict[str, Any]) -> None:
        tokens, (begin, end) = self.calibration.batches.tokens, timing["forward"]
        rate = round(tokens / max(end - begin, 1e-9))
        self.log.write(
            "layer", label=unit.label, index=unit.index, **timing, bytes_read=unit.nbytes, tokens=tokens,
            tokens_per_s=rate, rss_bytes=peak_rss_bytes(), **more,
        )  # fmt: skip

    # --- hidden states before the first layer, and between two runs ---

    def _embed(self, skeleton: Skeleton, hidden: HiddenStates) -> list[list[dict[str, Any]]]:
        """Fill in the hidden states before the first layer; returns what every layer is called with, by batch."""
        import torch

        checkpoint = self.plan.checkpoint
        tensor = checkpoint.tensors[skeleton.embedding_tensor]
        shard = checkpoint.shards[tensor.shard]
        file = open_shard(shard)

        def rows(ids: list[int]) -> Any:
            """Single rows: a batch needs a few hundred of them, and the table may be larger than a layer."""
            width = tensor.nbytes // tensor.shape[0]
            data = bytearray(len(ids) * width)
            for place, token in enumerate(ids):
                if not 0 <= token < tensor.shape[0]:
                    raise SourceError(
                        f"{tensor.name}: it has {tensor.shape[0]} rows, but the tokenizer gives token {token}; the "
                        "tokenizer belongs to another model"
                    )
                view = memoryview(data)[place * width : (place + 1) * width]
                read_exactly(file, shard, tensor.name, tensor.offset + token * width, view)
            refuse_not_finite(tensor, memoryview(data))
            table = torch.frombuffer(data, dtype=torch_dtypes()[tensor.dtype]).view(len(ids), tensor.shape[1])
            return table.to(device=self.device, dtype=torch.bfloat16)

        try:
            known: dict[tuple[int, int], list[dict[str, Any]]] = {}
            calls = []
            batches = self.calibration.batches.batches
            for number, (state, each) in enumerate(skeleton.first_inputs(batches, rows)):
                hidden.put(number, state)
                shape = batches[number].rows, batches[number].length
                calls.append(known.setdefault(shape, each))  # nothing is padded: the shape decides positions and masks
            return calls
        finally:
            os.close(file)

    def _restore(self, hidden: HiddenStates, first_open: int) -> int:
        """Go back to the hidden states that were saved last; returns the layer that comes next."""
        saved = self.journal.saved
        if saved is None or saved.layer >= first_open:
            return 0
        path = self.journal.partial / saved.file
        if not hidden.load(path, saved.nbytes, saved.sha256):
            self.log.write("hidden_lost", layer=saved.layer, file=saved.file)
            self.seen.notes.append(f"{path}: the hidden states saved there are lost; all forwards ran again")
            return 0
        return saved.layer + 1

    def _save(self, hidden: HiddenStates, unit: LayerUnit) -> None:
        """One generation is kept: the one before goes once the journal knows the new one."""
        begin, before = time.time(), self.journal.saved
        path = self.scratch.file(f"{unit.index:05d}")
        self.saved_at = time.monotonic()
        try:
            nbytes, digest = hidden.save(path)
        except OSError as error:  # a later resume has more to replay; that is no reason to end
            self.log.write("hidden_not_saved", layer=unit.index, error=str(error))
            self.seen.notes.append(
                f"{path}: hidden states could not be saved ({error.strerror}); a resume would replay"
            )
            return
        self.journal.save(Saved(unit.index, self.scratch.relative(path), nbytes, digest))
        if before is not None and (old := self.journal.partial / before.file) != path:
            old.unlink(missing_ok=True)
        self.log.write("hidden_saved", layer=unit.index, bytes=nbytes, span=[begin, time.time()])


# --- what a layer is read into -----------------------------------------------------------------------


# --- guards and settings -----------------------------------------------------------------------------


def _check_made(unit: LayerUnit, made: dict[str, Any], plan: Plan) -> None:
    """What the plan promised, with its shape and dtype; a failure here is a mistake of this program."""
    import torch

    dtypes = {**torch_dtypes(), "F8_E4M3": torch.float8_e4m3fn}
    if missing := [name for name in unit.made if name not in made]:
        raise PipelineError(f"{missing[0]}: {plan.backend.name} made no such tensor", remedy="please report it")
    for name, value in made.items():
        output = plan.outputs.get(name)
        if output is None or (dtypes[output.dtype], output.shape) != (value.dtype, tuple(value.shape)):
            planned = "nothing" if output is None else f"{output.dtype} {list(output.shape)}"
            raise PipelineError(
                f"{name}: made as {value.dtype} {list(value.shape)}, planned as {planned}", remedy="please report it"
            )
