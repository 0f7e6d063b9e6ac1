"""Finished decoder layers are written behind the computing, and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from pipeline.checkpoint.layout import OutputTensor
from pipeline.checkpoint.writer import ShardWriter
from pipeline.journal import Digest, Journal
from pipeline.plan.layout import LayerUnit, Piece
from pipeline.stream.compute import Compute, Span, parts
from pipeline.stream.layer_reader import RawLayer
from pipeline.stream.tensor_bytes import bytes_of, digest_of


class LayerWriter:
    """Puts layers into the shards, one at a time, beside the thread that computes the next.

    Args:
        shards: open.
        outputs: where each output tensor belongs.
        compute: what a piece of a layer becomes.
        journal: a layer is recorded once its bytes are on the device.
        threads: how many pieces of a layer are quantized and hashed at once.

    Attributes:
        units: layers that were recorded so far.
        bytes_written: of them.
    """

    def __init__(
        self, shards: ShardWriter, outputs: Mapping[str, OutputTensor], compute: Compute, journal: Journal, threads: int
    ) -> None:
        self._shards, self._outputs, self._compute, self._journal = shards, outputs, compute, journal
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self.units = 0
        self.bytes_written = 0

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._pool.shutdown()

    def submit(
        self,
        unit: LayerUnit,
        raw: RawLayer,
        made: Mapping[str, Any],
        facts: dict[str, Any],
        written: Callable[[int, Span], None],
    ) -> None:
        """Begin to write a layer; the one before it has to be done, see `wait`.

        Args:
            unit: the layer.
            raw: its bytes, in use until `written` is called.
            made: by output tensor name, what the backend made, as tensors on the CPU.
            facts: what was observed, for the journal.
            written: called from the writing thread once the layer is recorded, with its bytes and the span.
        """
        self._writing = self._thread.submit(self._write, unit, raw, made, facts, written)

    def wait(self) -> None:
        """Return when nothing is being written; raises what the writing raised."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(
        self,
        unit: LayerUnit,
        raw: RawLayer,
        made: Mapping[str, Any],
        facts: dict[str, Any],
        written: Callable[[int, Span], None],
    ) -> None:
        begin = time.time()

        def piece_digests(piece: Piece) -> list[Digest]:
            data, used = self._compute.result(piece, raw.view(piece.tensor, piece.offset, piece.nbytes))
            digests = [
                self._put(write.tensor, write.offset, part)
                for write, part in parts(piece, data)
                if write.tensor not in made  # what cross-layer equalization changed is the backend's
            ]
            self._compute.give_back(used)
            return digests

        def made_digests(name: str) -> list[Digest]:
            return [self._put(name, self._outputs[name].offset, bytes_of(made[name]))]

        futures = [self._pool.submit(piece_digests, piece) for piece in unit.pieces]
        futures += [self._pool.submit(made_digests, name) for name in made]
        digests = [digest for future in futures for digest in future.result()]
        self._shards.flush()
        self._journal.finish(unit.unit, digests, facts, [raw.hashes[tensor.name] for tensor in unit.tensors])
        nbytes = sum(digest.nbytes for digest in digests)
        self.units += 1
        self.bytes_written += nbytes
        written(nbytes, (begin, time.time()))

    def _put(self, name: str, offset: int, data: memoryview) -> Digest:
        self._shards.write(self._outputs[name].shard, offset, data)
        return digest_of(name, offset, data)
