"""What a quantizing thread does with a piece, and the memory that it does it in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from pipeline.backends.base import Backend, DataFreeBackend
from pipeline.backends.fp8 import NonFiniteWeight, check_finite, transpose
from pipeline.checkpoint.source import DTYPE_BYTES
from pipeline.journal import Digest
from pipeline.plan.layout import Piece, Write
from pipeline.stream.tensor_bytes import digest_of, is_weight, not_finite, source_hash

Span = tuple[float, float]


@dataclass
class Result:
    """A piece, computed: its bytes, their hashes, that of its source, and the spans of its stages.

    Spans are in seconds since the epoch.
    """

    piece: Piece
    data: memoryview
    buffers: list[bytearray]
    digests: list[Digest]
    source: str
    read: Span
    quantize: Span
    thread: str


def parts(piece: Piece, data: memoryview) -> Iterator[tuple[Write, memoryview]]:
    """The writes of a piece, each with its bytes of the piece's result `data`."""
    return ((write, data[write.start : write.start + write.nbytes]) for write in piece.writes)


class Compute:
    """What a quantizing thread does with a piece, and the memory that it does it in.

    Buffers are reused: fresh pages for every piece would cost a page fault each 4 KiB.

    Args:
        backend: asked for a quantizer of each dtype that a piece quantizes; a data-free one, where any does.
        pieces: all that will ever be computed; the largest decides how long a buffer is.
    """

    def __init__(self, backend: Backend, pieces: Sequence[Piece]) -> None:
        dtypes = {piece.dtype for piece in pieces if piece.kind == "quantize"}
        self._quantizers = {dtype: cast(DataFreeBackend, backend).quantizer(dtype) for dtype in dtypes}
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
        source = source_hash(memoryview(buffer)[: piece.nbytes])
        data, used = self.result(piece, memoryview(buffer)[: piece.nbytes])
        digests = [digest_of(write.tensor, write.offset, part) for write, part in parts(piece, data)]
        thread = threading.current_thread().name
        return Result(piece, data, [buffer, *used], digests, source, read, (begin, time.time()), thread)

    def result(self, piece: Piece, data: memoryview) -> tuple[memoryview, list[bytearray]]:
        """A piece's result, from its bytes, and the buffers that hold it until they are given back.

        Raises:
            SourceError: a weight is not finite.
        """
        used: list[bytearray] = []
        try:
            return self._result(piece, data, used), used
        except NonFiniteWeight as error:
            row = None if error.row is None else piece.first_row + error.row
            raise not_finite(piece.tensor, row) from None

    def _result(self, piece: Piece, data: memoryview, used: list[bytearray]) -> memoryview:
        if piece.kind == "copy":
            if is_weight(piece.tensor):
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
        split = piece.result_nbytes - piece.rows * piece.columns  # one byte per quantized value, behind the scales
        scales, values = result[:split], result[split:]
        self._quantizers[piece.dtype](data, values, scales, piece.rows, piece.columns)
        return result
