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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.checkpoint.reader import announce, open_shard, read_exactly, refuse_changed
from pipeline.checkpoint.writer import ShardWriter, lost_shards
from pipeline.errors import Interrupted
from pipeline.events import EventLog
from pipeline.journal import Digest, Journal
from pipeline.machine.memory import rss_bytes
from pipeline.plan.plan import Plan
from pipeline.stream.compute import Compute, Result
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
