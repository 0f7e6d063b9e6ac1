"""The data-free stream: reading ahead, quantizing and writing behind, all at once.

One thread reads pieces in file order, several quantize and hash, one writes in order and flushes each unit
before its line goes into the journal. A bounded number of pieces is in memory, so the model's size and depth
do not matter. Every source byte is read once and every output byte written once.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from pipeline.backends.base import DataFreeBackend
from pipeline.backends.fp8 import NonFiniteWeight, check_finite, transpose
from pipeline.checkpoint.reader import announce, open_shard, read_exactly, refuse_changed
from pipeline.checkpoint.source import DTYPE_BYTES, SourceError
from pipeline.checkpoint.writer import ShardWriter, lost_shards
from pipeline.errors import Interrupted
from pipeline.events import EventLog
from pipeline.journal import Digest, Journal
from pipeline.machine.memory import rss_bytes
from pipeline.plan.layout import Piece
from pipeline.plan.plan import Plan

Span = tuple[float, float]
READ_AHEAD_BYTES = 64 << 20


@dataclass
class Result:
    """A piece, computed: its bytes, their hashes and the spans of its stages in seconds since the epoch."""

    piece: Piece
    data: memoryview
    buffers: list[bytearray]
    digests: list[Digest]
    read: Span
    quantize: Span
    thread: str


@dataclass
class Totals:
    """What one call of `run_stream` did."""

    bytes_read: int = 0
    bytes_written: int = 0
    units: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0  # where the peak was begun anew in between; see events.reset_peak_rss


def take_back_lost_units(plan: Plan, journal: Journal) -> list[str]:
    """Forget finished units whose shard is missing or short, e.g. after a power cut; returns those shards' names."""
    lost = lost_shards(journal.partial, plan.shards)
    gone = {p.unit for p in plan.pieces if p.unit in journal.done and any(w.shard in lost for w in p.writes)}
    for layer in plan.layers:
        shards = {w.shard for p in layer.pieces for w in p.writes} | {plan.outputs[name].shard for name in layer.made}
        if layer.unit in journal.done and shards & lost:
            gone.add(layer.unit)
    journal.forget(gone)
    return [plan.shards[index].name for index in sorted(lost)] if gone else []


def run_stream(
    plan: Plan,
    journal: Journal,
    log: EventLog,
    stop: threading.Event,
    on_progress: Callable[[str, int], None],
) -> Totals:
    """Fill in the output shards, unit by unit, from the first unit that the journal has not.

    Args:
        plan: what goes where.
        journal: open; finished units are skipped and new ones recorded.
        log: gets a ``piece`` event a piece and a ``unit`` event a unit.
        stop: when set, the unit under way is finished and `Interrupted` raised.
        on_progress: called by the writing thread after each piece, with a label and the bytes read.

    Raises:
        SourceError: a weight is not finite, or a file changed or ended early.
        Interrupted: `stop` was set before the last unit.
        OSError: the disk's own failures.
    """
    todo = [piece for piece in plan.pieces if piece.unit not in journal.done]
    totals, begun = Totals(), time.perf_counter()
    if not todo:
        return totals
    failed = threading.Event()
    slots = threading.Semaphore(plan.in_flight)
    ordered: queue.SimpleQueue[Future[Result] | BaseException | None] = queue.SimpleQueue()
    compute = Compute(plan, plan.pieces)

    def read_ahead() -> None:
        files: dict[int, int] = {}
        try:
            unit = todo[0].unit
            for piece in todo:
                if piece.unit != unit and stop.is_set():
                    break
                unit = piece.unit
                slots.acquire()
                if failed.is_set():
                    break
                if piece.shard not in files:
                    for file in files.values():
                        os.close(file)
                    files = {piece.shard: open_shard(plan.checkpoint.shards[piece.shard])}
                begin = time.time()
                file = files[piece.shard]
                announce(file, piece.offset + piece.nbytes, READ_AHEAD_BYTES)
                buffer = compute.take()
                shard = plan.checkpoint.shards[piece.shard]
                read_exactly(file, shard, piece.tensor, piece.offset, memoryview(buffer)[: piece.nbytes])
                ordered.put(pool.submit(compute, piece, buffer, (begin, time.time())))
            ordered.put(None)
        except BaseException as error:
            ordered.put(error)
        finally:
            for file in files.values():
                os.close(file)

    with (
        ShardWriter(journal.partial, plan.shards) as writer,
        ThreadPoolExecutor(plan.threads, thread_name_prefix="quantize") as pool,
    ):
        reader = threading.Thread(target=read_ahead, name="read", daemon=True)
        reader.start()
        try:
            _write_behind(plan, ordered, slots, compute, writer, journal, log, totals, on_progress)
        finally:
            failed.set()
            for _ in range(2):
                slots.release()
            reader.join()
    totals.seconds = time.perf_counter() - begun
    if any(piece.unit not in journal.done for piece in plan.pieces):
        raise Interrupted("interrupted")
    return totals


def _write_behind(
    plan: Plan,
    ordered: queue.SimpleQueue[Future[Result] | BaseException | None],
    slots: threading.Semaphore,
    compute: Compute,
    writer: ShardWriter,
    journal: Journal,
    log: EventLog,
    totals: Totals,
    on_progress: Callable[[str, int], None],
) -> None:
    """Write results in order; at each unit's end flush, then record it."""
    unit: int | None = None
    digests: list[Digest] = []
    read_from: set[int] = set()

    def finish(number: int) -> None:
        begin = time.time()
        writer.flush()
        for shard in read_from:
            refuse_changed(plan.checkpoint.shards[shard])
        read_from.clear()
        journal.finish(number, list(digests))
        log.write("unit", unit=number, bytes=sum(d.nbytes for d in digests), flush=[begin, time.time()])
        digests.clear()
        totals.units += 1

    while (item := ordered.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        result = item.result()
        piece = result.piece
        if unit is not None and piece.unit != unit:
            finish(unit)
        unit = piece.unit
        begin = time.time()
        for write in piece.writes:
            writer.write(write.shard, write.offset, result.data[write.start : write.start + write.nbytes])
        digests.extend(result.digests)
        read_from.add(piece.shard)
        totals.bytes_read += piece.nbytes
        totals.bytes_written += piece.result_nbytes
        log.write(
            "piece",
            label=piece.label,
            tensor=piece.tensor,
            thread=result.thread,
            read=result.read,
            quantize=result.quantize,
            write=(begin, time.time()),
            bytes_read=piece.nbytes,
            bytes_written=piece.result_nbytes,
            rss_bytes=rss_bytes(),
        )
        compute.give_back(result.buffers)
        slots.release()
        on_progress(piece.label, piece.nbytes)
    if unit is not None:
        finish(unit)


class Compute:
    """What a quantizing thread does with a piece, and the memory that it does it in.

    Buffers are reused: fresh pages for every piece would cost a page fault each 4 KiB.
    """

    def __init__(self, plan: Plan, pieces: Sequence[Piece]) -> None:
        dtypes = {piece.dtype for piece in pieces if piece.kind == "quantize"}
        self._quantizers = {dtype: cast(DataFreeBackend, plan.backend).quantizer(dtype) for dtype in dtypes}
        self._size = max((max(piece.nbytes, piece.result_nbytes) for piece in pieces), default=0)
        self._free: list[bytearray] = []  # list.append and list.pop are atomic

    def take(self) -> bytearray:
        """A buffer that holds any piece and any result."""
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(self._size)

    def give_back(self, buffers: list[bytearray]) -> None:
        """These may be used again."""
        self._free.extend(buffers)

    def __call__(self, piece: Piece, buffer: bytearray, read: Span) -> Result:
        """A piece that was read into `buffer`, with its hashes and times."""
        begin = time.time()
        data, used = self.result(piece, memoryview(buffer)[: piece.nbytes])
        digests = [
            Digest(w.tensor, w.offset, w.nbytes, hashlib.sha256(data[w.start : w.start + w.nbytes]).hexdigest())
            for w in piece.writes
        ]
        thread = threading.current_thread().name
        return Result(piece, data, [buffer, *used], digests, read, (begin, time.time()), thread)

    def result(self, piece: Piece, data: memoryview) -> tuple[memoryview, list[bytearray]]:
        """A piece's result, from its bytes, and the buffers that hold it until they are given back.

        Raises:
            SourceError: a weight is not finite.
        """
        used: list[bytearray] = []
        try:
            return self._result(piece, data, used), used
        except NonFiniteWeight as error:
            row = "" if error.row is None else f" in row {piece.first_row + error.row}"
            raise SourceError(
                f"{piece.tensor}: NaN or Inf{row}; the checkpoint is damaged or the training diverged, use a sound one"
            ) from None

    def _result(self, piece: Piece, data: memoryview, used: list[bytearray]) -> memoryview:
        if piece.kind == "copy":
            if piece.tensor.endswith((".weight", ".bias", "_proj")):  # a mask in a buffer may well hold -Inf
                check_finite(data, piece.dtype)
            return data
        width = DTYPE_BYTES[piece.dtype]
        if piece.transposed:
            used.append(self.take())
            turned = memoryview(used[-1])[: piece.nbytes]
            transpose(data, turned, piece.columns, piece.rows, width)
            data = turned
        used.append(self.take())
        result = memoryview(used[-1])[: piece.result_nbytes]
        scales, codes = result[: piece.rows * width], result[piece.rows * width :]
        self._quantizers[piece.dtype](data, codes, scales, piece.rows, piece.columns)
        return result
