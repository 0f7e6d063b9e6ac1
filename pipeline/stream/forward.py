"""Running token batches through a model, one decoder layer at a time.

The forward is transformers' own, in BF16. Between two layers the hidden states of every batch wait in an
`ActivationCache`, so each layer is loaded once and runs each batch once. Who runs them, and what is observed meanwhile,
is the caller's business: nothing here knows of a plan, a journal or a scheme.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.reader import open_shard, read_exactly
from pipeline.checkpoint.source import Checkpoint, SourceError
from pipeline.errors import DeviceFault, OutOfMemory, PipelineError, is_device_fault, is_out_of_memory
from pipeline.stream.tensor_bytes import refuse_not_finite, torch_dtypes

if TYPE_CHECKING:
    from pipeline.model.batch import Batch
    from pipeline.model.skeleton import Layer, Skeleton
    from pipeline.stream.hidden import ActivationCache

TIMED = 64  # batches of a layer whose seconds are taken, at most


@dataclass
class Passed:
    """How all batches ran through one layer.

    Attributes:
        span: from the first batch to the last, in seconds since the epoch.
        timed: tokens and seconds of some batches of all sizes; empty on a GPU, which computes while this goes on.
    """

    span: tuple[float, float]
    timed: list[tuple[int, float]] = field(default_factory=list)


class Forward:
    """Token batches on their way through the layers of a model.

    Args:
        skeleton: the model without weights.
        batches: what runs through it.
        device: what computes, a ``torch.device``.
        cache: holds the hidden states of these batches between two layers.

    Attributes:
        count: how often a batch ran through a layer so far; probes do not count.
        on_batch: called after each of them, with how many of how many have run through the layer; None: nobody asks.
    """

    def __init__(self, skeleton: Skeleton, batches: Sequence[Batch], device: Any, cache: ActivationCache) -> None:
        self._skeleton, self._batches, self._device, self._cache = skeleton, batches, device, cache
        self._arguments: list[list[dict[str, Any]]] = []  # of every layer, by batch
        by_tokens = sorted(range(len(batches)), key=lambda number: batches[number].tokens)
        step = -(-len(batches) // TIMED)
        self._timed = {*by_tokens[::step], by_tokens[-1]} if device.type == "cpu" else set()
        self._most_tokens = batches[by_tokens[-1]].tokens
        self.count = 0
        self.on_batch: Callable[[int, int], None] | None = None

    def embed(self, checkpoint: Checkpoint) -> None:
        """Fill the cache with what reaches the first layer, and keep what every layer is called with.

        Args:
            checkpoint: its embedding is read, row by row.

        Raises:
            SourceError: the embedding is not finite, or has no row for a token.
        """
        known: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._arguments.clear()
        with embedding_rows(checkpoint, self._skeleton.embedding_tensor, self._device) as rows:
            for number, (state, arguments) in enumerate(self._skeleton.first_inputs(self._batches, rows)):
                self._cache.put(number, state)
                shape = self._batches[number].rows, self._batches[number].length
                # nothing is padded: the shape decides positions and masks
                self._arguments.append(known.setdefault(shape, arguments))

    def load(self, index: int, tensors: Mapping[str, Any]) -> Layer:
        """Fill decoder layer `index` with its tensors, by tensor name, as they were read.

        Raises:
            SourceError: transformers cannot load the layer.
        """
        layer = self._skeleton.load_layer(index, tensors)
        synchronize(self._device)
        return layer

    def run(self, layer: Layer) -> Passed:
        """Run every batch through a loaded layer once; the cache then holds what the layer made of them.

        Raises:
            PipelineError: what the layer computes is not finite.
        """
        import torch

        finite = torch.ones((), dtype=torch.bool, device=self._device)
        passed = Passed((time.time(), 0.0))
        with torch.no_grad():
            for number in range(len(self._batches)):
                began = time.time()
                result = self._call(layer, number)
                finite.logical_and_(result.isfinite().all())
                self._cache.put(number, result)
                self.count += 1
                if self.on_batch is not None:
                    self.on_batch(number + 1, len(self._batches))
                if number in self._timed:
                    passed.timed.append((self._batches[number].tokens, round(time.time() - began, 6)))
            synchronize(self._device)
        passed.span = passed.span[0], time.time()
        if not bool(finite):
            raise PipelineError(
                f"{layer.prefix}: what it computes is not finite; its weights are damaged, or overflow in BF16"
            )
        return passed

    def probe(self, layer: Layer) -> Any:
        """What a loaded layer makes of the last batch, [rows, length, hidden]; the cache stays as it is."""
        import torch

        with torch.no_grad():
            return self._call(layer, len(self._batches) - 1)

    def _call(self, layer: Layer, number: int) -> Any:
        result = layer.module(self._cache.take(number), **self._arguments[number][layer.index])
        return result[0] if isinstance(result, tuple) else result

    def drop(self, layer: Layer) -> None:
        """Release a layer's weights; it never runs again."""
        self._skeleton.drop_layer(layer.index)

    @contextmanager
    def explained(self, layer: Layer) -> Iterator[None]:
        """Within, what torch and transformers raise while a layer runs becomes an error that says what to do.

        Raises:
            OutOfMemory: the device has too little for the layer and a batch.
            DeviceFault: the GPU failed.
            PipelineError: transformers cannot run the layer.
        """
        try:
            yield
        except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"{layer.prefix}: memory of {self._device.type} ran out with this layer and {self._most_tokens} "
                    "tokens at once",
                    remedy="free some, lower calibration.batch_tokens, or use another runtime.device",
                ) from None
            text = (str(error).strip().splitlines() or [""])[0][:200]
            if is_device_fault(error):
                raise DeviceFault(
                    f"{layer.prefix}: the GPU failed ({text})",
                    remedy="look at its health (dmesg, nvidia-smi -q), then run the same command again to go on",
                ) from error
            raise PipelineError(
                f"{layer.prefix}: transformers cannot run this layer ({type(error).__name__}: {text})",
                remedy="does config.json belong to these weights?",
            ) from error


@contextmanager
def embedding_rows(checkpoint: Checkpoint, name: str, device: Any) -> Iterator[Callable[[list[int]], Any]]:
    """Within, single rows of an embedding: a batch needs a few hundred, and the table may be larger than a layer.

    Args:
        checkpoint: has it.
        name: of the embedding's tensor, [tokens, hidden].
        device: where the rows are put.

    Yields:
        A function from token ids to their rows, [ids, hidden] in BF16. It raises SourceError where a row does not
        exist or is not finite.
    """
    import torch

    tensor = checkpoint.tensors[name]
    shard = checkpoint.shards[tensor.shard]
    width = tensor.nbytes // tensor.shape[0]
    file = open_shard(shard)

    def rows(ids: list[int]) -> Any:
        data = bytearray(len(ids) * width)
        for row, token in enumerate(ids):
            if not 0 <= token < tensor.shape[0]:
                raise SourceError(
                    f"{name}: it has {tensor.shape[0]} rows, but the tokenizer gives token {token}; the tokenizer "
                    "belongs to another model"
                )
            view = memoryview(data)[row * width : (row + 1) * width]
            read_exactly(file, shard, name, tensor.offset + token * width, view)
        refuse_not_finite(name, tensor.dtype, memoryview(data))
        table = torch.frombuffer(data, dtype=torch_dtypes()[tensor.dtype]).view(len(ids), tensor.shape[1])
        return table.to(device=device, dtype=torch.bfloat16)

    try:
        yield rows
    finally:
        os.close(file)


def count_expert_tokens(layer: Layer) -> Callable[[], dict[str, list[int]]]:
    """Count what a router sends to each expert; the function returned ends the counting."""
    import torch

    counts: dict[str, Any] = {}
    hooks = []
    for block in layer.experts:
        name, experts = f"{layer.prefix}.{block.path}", len(block.names)

        def look(_module: Any, args: Any, kwargs: Any, name: str = name, experts: int = experts) -> None:
            numbered = (torch.int64, torch.int32)
            chosen = next((v for v in (*args, *kwargs.values()) if getattr(v, "dtype", None) in numbered), None)
            if chosen is None:
                return
            numbers = torch.arange(experts, device=chosen.device)
            seen = (chosen.reshape(-1, 1) == numbers).sum(0)
            counts[name] = seen if name not in counts else counts[name] + seen

        hooks.append(block.module.register_forward_pre_hook(look, with_kwargs=True))

    def end() -> dict[str, list[int]]:
        for hook in hooks:
            hook.remove()
        return {name: value.tolist() for name, value in counts.items()}

    return end


def synchronize(device: Any) -> None:
    """Wait until a GPU has computed what it was given; a CPU has."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def return_memory() -> None:
    """Give what the layer before left free back to the system, so that the heap's holes do not grow with the depth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Within, the same bits every time: deterministic kernels, and on a CPU a fixed number of threads."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    before, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict)
        settings.fill_uninitialized_memory = filled
