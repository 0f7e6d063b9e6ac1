"""Decoder layers as bytes, each read ahead while the layer before it computes."""

from __future__ import annotations

import os
import queue
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

from pipeline.checkpoint.reader import announce, open_shard, read_exactly, refuse_changed
from pipeline.checkpoint.source import Checkpoint, Tensor
from pipeline.errors import Interrupted
from pipeline.stream.tensor_bytes import is_weight, refuse_not_finite, source_hash, torch_dtypes

ALIGNMENT = 64
IN_FLIGHT = 2


class LayerTensors(Protocol):
    """What has to be known of a decoder layer to read it."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of its tensors in the source."""

    @property
    def nbytes(self) -> int:
        """The sum of their lengths."""


class RawLayer:
    """The bytes of a layer, as they were read.

    Attributes:
        tensors: by tensor name, torch's view of the bytes, with the source's dtype and shape, on the CPU.
        hashes: by tensor name, of the bytes as they were read; see `source_hash`.
        span: when they were read, in seconds since the epoch.
    """

    def __init__(self, storage: Any) -> None:
        self._storage = storage  # uint8, pinned where a GPU takes it from here
        self._memory = memoryview(storage.numpy())
        self._starts: dict[str, tuple[Tensor, int]] = {}
        self._filled = 0
        self.tensors: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}
        self.span = (0.0, 0.0)

    def clear(self) -> None:
        """Forget the layer; its memory may be filled again."""
        self._starts.clear()
        self.tensors.clear()
        self.hashes.clear()
        self._filled = 0

    def add(self, tensor: Tensor) -> memoryview:
        """Where the tensor's bytes belong."""
        start = self._filled
        self._filled += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._starts[tensor.name] = tensor, start
        flat = self._storage[start : start + tensor.nbytes].view(torch_dtypes()[tensor.dtype])
        self.tensors[tensor.name] = flat.view(tensor.shape)
        return self._memory[start : start + tensor.nbytes]

    def view(self, name: str, offset: int, nbytes: int) -> memoryview:
        """`nbytes` of tensor `name` from `offset`, which counts from the start of the source's shard."""
        tensor, start = self._starts[name]
        begin = start + offset - tensor.offset
        return self._memory[begin : begin + nbytes]


class LayerReader:
    """Reads decoder layers one after the other, each tensor once, one layer ahead of the one that is asked for.

    Two layers are in memory at once: one is computed, and then written, while the other is read. Whoever gets a layer
    gives it back, or the reading waits. Within a ``with`` block::

        with LayerReader(checkpoint, layers, device) as reader:
            for layer, raw in zip(layers, reader, strict=True):
                ...
                reader.give_back(raw)

    Args:
        checkpoint: the source, whose shards have the tensors.
        layers: in the order in which they will be asked for.
        device: what computes; a GPU gets pinned memory.

    Attributes:
        bytes_read: so far.
        reads: by name, how often each tensor was read.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[LayerTensors], device: Any) -> None:
        self._checkpoint = checkpoint
        self._layers = layers
        self._buffers = _Buffers(layers, pinned=device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self.bytes_read = 0
        self.reads: Counter[str] = Counter()

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffers.close()
        self._thread.shutdown()

    def __iter__(self) -> Iterator[RawLayer]:
        """The layers, in order; while one is in the caller's hands, the next is read.

        Raises:
            SourceError: a weight holds NaN or Inf, or a file changed or ended early.
        """
        if not self._layers:
            return
        ahead = self._thread.submit(self._read, self._layers[0])
        for following in self._layers[1:]:
            raw = ahead.result()
            ahead = self._thread.submit(self._read, following)
            yield raw
        yield ahead.result()

    def give_back(self, raw: RawLayer) -> None:
        """Nothing needs this layer's bytes any more."""
        self._buffers.give_back(raw)

    def _read(self, layer: LayerTensors) -> RawLayer:
        raw = self._buffers.take()
        begin = time.time()
        order = sorted(layer.tensors, key=lambda tensor: (tensor.shard, tensor.offset))
        for index in dict.fromkeys(tensor.shard for tensor in order):
            shard = self._checkpoint.shards[index]
            file = open_shard(shard)
            try:
                here = [tensor for tensor in order if tensor.shard == index]
                for tensor in here:
                    announce(file, tensor.offset, tensor.nbytes)
                for tensor in here:
                    data = raw.add(tensor)
                    read_exactly(file, shard, tensor.name, tensor.offset, data)
                    raw.hashes[tensor.name] = source_hash(data)
                    self.reads[tensor.name] += 1
                    if is_weight(tensor.name):
                        refuse_not_finite(tensor.name, tensor.dtype, data)
            finally:
                os.close(file)
            refuse_changed(shard)
        self.bytes_read += layer.nbytes
        raw.span = begin, time.time()
        return raw


class _Buffers:
    """Reused memory for two layers."""

    def __init__(self, layers: Sequence[LayerTensors], pinned: bool) -> None:
        self._size = max((layer.nbytes + ALIGNMENT * len(layer.tensors) for layer in layers), default=0)
        self._pinned = pinned
        self._free: queue.SimpleQueue[RawLayer | None] = queue.SimpleQueue()
        self._made = 0

    def take(self) -> RawLayer:
        """A free one; waits for it."""
        import torch

        if self._made < IN_FLIGHT:
            self._made += 1
            return RawLayer(torch.empty(self._size, dtype=torch.uint8, pin_memory=self._pinned))
        raw = self._free.get()
        if raw is None:
            raise Interrupted("the run ended")
        return raw

    def give_back(self, raw: RawLayer) -> None:
        """It may be used again."""
        raw.clear()
        self._free.put(raw)

    def close(self) -> None:
        """Nobody waits from now on."""
        self._free.put(None)
