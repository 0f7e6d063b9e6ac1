"""What a quantizing thread does with a piece, and the memory that it does it in."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from pipeline.backends.base import DataFreeBackend
from pipeline.backends.fp8 import NonFiniteWeight, check_finite, transpose
from pipeline.checkpoint.source import DTYPE_BYTES, SourceError
from pipeline.journal import Digest
from pipeline.plan.layout import Piece
from pipeline.plan.plan import Plan

Span = tuple[float, float]


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
                f"{piece.tensor}: NaN or Inf{row}",
                remedy="the checkpoint is damaged or the training diverged, use a sound one",
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
