"""The data-free stream: reading ahead, quantizing and writing behind, all at once.

One thread reads pieces in file order, several quantize and hash, one writes in order and flushes each unit
before its line goes into the journal. A bounded number of pieces is in memory, so the model's size and depth
do not matter. Every source byte is read once and every output byte written once.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from pipeline.checkpoint.reader import announce, open_shard, read_exactly, refuse_changed
from pipeline.checkpoint.source import Checkpoint
from pipeline.checkpoint.writer import ShardWriter, lost_shards
from pipeline.errors import Interrupted
from pipeline.events import EventLog
from pipeline.journal import Digest, Journal
from pipeline.machine.memory import rss_bytes
from pipeline.plan.layout import Piece
from pipeline.plan.plan import Plan
from pipeline.stream.compute import Compute, Result, parts
from pipeline.stream.totals import Totals

READ_AHEAD_BYTES = 64 << 20


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
        log: gets a ``piece`` event per piece and a ``unit`` event per unit.
        stop: when set, the unit under way is finished and `Interrupted` raised.
        on_progress: called after each piece that was written, with a label and the bytes read.

    Raises:
        SourceError: a weight is not finite, or a file changed or ended early.
        Interrupted: `stop` was set before the last unit.
        OSError: the disk's own failures.
    """
    todo = [piece for piece in plan.pieces if piece.unit not in journal.done]
    if not todo:
        return Totals()
    begun, compute = time.perf_counter(), Compute(plan.backend, plan.pieces)
    with (
        ShardWriter(journal.partial, plan.shards) as shards,
        ThreadPoolExecutor(plan.threads, thread_name_prefix="quantize") as pool,
        _ReadAhead(plan.checkpoint, todo, compute, pool, plan.in_flight, stop) as results,
    ):
        writer = _Writer(shards, plan.checkpoint, journal, log)
        for result in results:
            writer.put(result)
            compute.give_back(result.buffers)
            results.written()
            on_progress(result.piece.label, result.piece.nbytes)
        writer.finish_unit()
    writer.totals.seconds = time.perf_counter() - begun
    if any(piece.unit not in journal.done for piece in plan.pieces):
        raise Interrupted("interrupted")
    return writer.totals


class _ReadAhead:
    """Reads pieces in a thread, in order, and hands them to a pool; gives out the results in the same order.

    Args:
        checkpoint: the source.
        pieces: what to read; not empty.
        compute: what the pool does with a piece that was read.
        pool: where it does so.
        in_flight: how many pieces may be read and not yet written.
        stop: when set, reading ends with the unit under way.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pieces: Sequence[Piece],
        compute: Compute,
        pool: ThreadPoolExecutor,
        in_flight: int,
        stop: threading.Event,
    ) -> None:
        self._checkpoint, self._pieces, self._compute, self._pool = checkpoint, pieces, compute, pool
        self._stop, self._ended = stop, threading.Event()
        self._slots = threading.Semaphore(in_flight)
        self._ordered: queue.SimpleQueue[Future[Result] | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="read", daemon=True)

    def __enter__(self) -> _ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._slots.release()  # it may wait for one
        self._thread.join()

    def __iter__(self) -> Iterator[Result]:
        while (item := self._ordered.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.result()

    def written(self) -> None:
        """A piece needs no memory any more: another may be read."""
        self._slots.release()

    def _run(self) -> None:
        try:
            self._read_all()
            self._ordered.put(None)
        except BaseException as error:
            self._ordered.put(error)

    def _read_all(self) -> None:
        opened, file, unit = -1, -1, self._pieces[0].unit
        try:
            for piece in self._pieces:
                if piece.unit != unit and self._stop.is_set():
                    return
                unit = piece.unit
                self._slots.acquire()
                if self._ended.is_set():
                    return
                shard = self._checkpoint.shards[piece.shard]
                if piece.shard != opened:
                    if file >= 0:
                        os.close(file)
                        file = -1
                    opened, file = piece.shard, open_shard(shard)
                begin = time.time()
                announce(file, piece.offset + piece.nbytes, READ_AHEAD_BYTES)
                buffer = self._compute.take()
                read_exactly(file, shard, piece.tensor, piece.offset, memoryview(buffer)[: piece.nbytes])
                self._ordered.put(self._pool.submit(self._compute, piece, buffer, (begin, time.time())))
        finally:
            if file >= 0:
                os.close(file)


class _Writer:
    """Writes results in order; at the end of each unit it flushes, then records the unit.

    Attributes:
        totals: of what was written so far.
    """

    def __init__(self, shards: ShardWriter, checkpoint: Checkpoint, journal: Journal, log: EventLog) -> None:
        self._shards, self._checkpoint, self._journal, self._log = shards, checkpoint, journal, log
        self._unit: int | None = None
        self._digests: list[Digest] = []
        self._sources: list[str] = []
        self._read_from: set[int] = set()
        self.totals = Totals()

    def put(self, result: Result) -> None:
        """Write a piece's result; the unit before it, if it was another, is finished first."""
        piece = result.piece
        if piece.unit != self._unit:
            self.finish_unit()
        self._unit = piece.unit
        begin = time.time()
        for write, part in parts(piece, result.data):
            self._shards.write(write.shard, write.offset, part)
        self._digests.extend(result.digests)
        self._sources.append(result.source)
        self._read_from.add(piece.shard)
        self.totals.bytes_read += piece.nbytes
        self.totals.bytes_written += piece.result_nbytes
        self._log.write(
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

    def finish_unit(self) -> None:
        """Make the unit under way durable and record it; without one, nothing."""
        if self._unit is None:
            return
        begin = time.time()
        self._shards.flush()
        for shard in self._read_from:
            refuse_changed(self._checkpoint.shards[shard])
        self._read_from.clear()
        self._journal.finish(self._unit, list(self._digests), None, list(self._sources))
        nbytes = sum(digest.nbytes for digest in self._digests)
        self._log.write("unit", unit=self._unit, bytes=nbytes, flush=[begin, time.time()])
        self._digests.clear()
        self._sources.clear()
        self._unit = None
        self.totals.units += 1
