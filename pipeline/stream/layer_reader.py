"""A decoder layer's bytes, read ahead while the layer before computes."""

from __future__ import annotations

import queue
from typing import Any

from pipeline.backends.fp8 import NonFiniteWeight, check_finite
from pipeline.checkpoint.source import SourceError, Tensor
from pipeline.errors import Interrupted
from pipeline.plan.layout import LayerUnit, Piece

ALIGNMENT = 64
IN_FLIGHT = 2


class RawLayer:
    """A layer's bytes as they were read, and torch's view of them."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage  # uint8, pinned where a GPU takes it from here
        self._memory = memoryview(storage.numpy())
        self._places: dict[str, tuple[Tensor, int]] = {}
        self._filled = 0
        self.tensors: dict[str, Any] = {}

    def clear(self) -> None:
        """Forget the layer; its memory may be filled again."""
        self._places.clear()
        self.tensors.clear()
        self._filled = 0

    def add(self, tensor: Tensor) -> memoryview:
        """Where the tensor's bytes belong."""
        start = self._filled
        self._filled += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._places[tensor.name] = tensor, start
        flat = self._storage[start : start + tensor.nbytes].view(torch_dtypes()[tensor.dtype])
        self.tensors[tensor.name] = flat.view(tensor.shape)
        return self._memory[start : start + tensor.nbytes]

    def view(self, piece: Piece) -> memoryview:
        """The bytes of a piece of one of these tensors."""
        tensor, start = self._places[piece.tensor]
        begin = start + piece.offset - tensor.offset
        return self._memory[begin : begin + piece.nbytes]


class LayerBuffers:
    """Reused memory for two layers: while one is computed, and then written, the other is read."""

    def __init__(self, layers: tuple[LayerUnit, ...], device: Any) -> None:
        self._size = max(layer.nbytes + ALIGNMENT * len(layer.tensors) for layer in layers)
        self._pinned = device.type == "cuda"
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


def torch_dtypes() -> dict[str, Any]:
    """The torch dtypes of the names that safetensors gives them, FP8 excepted."""
    import torch

    return {
        "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip


def bytes_of(value: Any) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    import torch

    return memoryview(value.contiguous().view(-1).view(torch.uint8).numpy())


def refuse_not_finite(tensor: Tensor, data: memoryview) -> None:
    """Raise SourceError where a tensor's bytes hold NaN or Inf."""
    try:
        check_finite(data, tensor.dtype)
    except NonFiniteWeight:
        raise SourceError(
            f"{tensor.name}: NaN or Inf", remedy="the checkpoint is damaged or the training diverged, use a sound one"
        ) from None
