"""Where every output byte comes from and goes: actions, shards, pieces and units of work."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.backends.base import Backend
from pipeline.checkpoint.layout import OutputShard, OutputTensor
from pipeline.checkpoint.source import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, SourceError, Tensor
from pipeline.errors import UsageError
from pipeline.formats.methods import is_cache_scale, is_weight_scale
from pipeline.model.selection import REASONS, ExpertLayout, Selection, attention_prefix, expert_modules

PIECE_BYTES = 16 << 20  # of source: stays in the last-level cache between read, cast and write
UNIT_BYTES = 128 << 20  # of output: what a kill can cost
Action = Literal["quantize", "copy", "drop"]
LEFT_OVER = "KV scale left over in a source that is not quantized: a server would use it"


@dataclass(frozen=True, slots=True)
class Write:
    """`nbytes` of a piece's result, from `start`, belong at `offset` of output shard `shard`, in `tensor`."""

    start: int
    nbytes: int
    shard: int
    offset: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous range of the source and what becomes of it.

    ``kind`` copy: the result is the range. ``kind`` quantize: the range is a ``rows x columns`` array of `dtype`
    (``columns x rows`` if `transposed`), the result is its scales, then its quantized values.
    """

    unit: int
    label: str
    tensor: str
    shard: int
    offset: int
    nbytes: int
    kind: Literal["copy", "quantize"]
    dtype: str
    rows: int
    columns: int
    transposed: bool
    first_row: int
    writes: tuple[Write, ...]

    @property
    def result_nbytes(self) -> int:
        """Bytes that this piece writes."""
        return sum(write.nbytes for write in self.writes)


@dataclass(frozen=True)
class TensorAction:
    """What happens to one source tensor, and why."""

    tensor: Tensor
    action: Action
    reason: str
    component: str
    layer: int | None
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerUnit:
    """A decoder layer of a calibrated run: one unit of the journal.

    Attributes:
        unit: its number.
        index: the layer's.
        label: its prefix, e.g. ``model.layers.3``.
        tensors: the source's, in file order.
        nbytes: of them.
        pieces: what is computed from the bytes alone: copies, and weights whose scheme needs no data.
        made: output tensors that the backend makes after calibration.
    """

    unit: int
    index: int
    label: str
    tensors: tuple[Tensor, ...]
    nbytes: int
    pieces: tuple[Piece, ...]
    made: tuple[str, ...]

    def result_nbytes(self, outputs: Mapping[str, OutputTensor]) -> int:
        """Bytes that this layer writes."""
        return sum(piece.result_nbytes for piece in self.pieces) + sum(outputs[name].nbytes for name in self.made)


@dataclass(frozen=True)
class _Block:
    """A contiguous range of a source tensor that is read as one array, and the modules it becomes."""

    offset: int  # from the tensor's first byte
    modules: tuple[tuple[str, int, int], ...]  # module, rows, columns, one under the other; empty: a copy
    transposed: bool = False


@dataclass(frozen=True)
class _Draft:
    action: TensorAction | None  # None: no source tensor becomes this; the backend makes it
    blocks: tuple[_Block, ...]
    # for each group that must share a shard: (name, dtype, shape)
    groups: tuple[tuple[tuple[str, str, tuple[int, ...]], ...], ...]
    layer: int | None = None
    made: bool = False  # by the backend after calibration, not from the source's bytes alone


def draft_outputs(checkpoint: Checkpoint, selection: Selection, backend: Backend) -> Iterator[_Draft]:
    """What every source tensor becomes, in file order, and what the backend adds to attention layers."""
    caches = _cache_drafts(selection, backend)
    for draft in _weight_drafts(checkpoint, selection, backend):
        yield draft
        assert draft.action is not None
        if (more := caches.get(draft.action.tensor.name)) is not None:
            yield more


def _cache_drafts(selection: Selection, backend: Backend) -> dict[str, _Draft]:
    """KV scales, by the key projection that they stand behind."""
    specs = backend.attention_outputs()
    if not specs:
        return {}
    found: dict[str, _Draft] = {}
    layers: set[int] = set()
    for name, choice in selection.choices.items():
        if choice.layer is None or (prefix := attention_prefix([name], f"{choice.component}.{choice.layer}")) is None:
            continue
        layers.add(choice.layer)
        group = tuple((f"{prefix}.{spec.suffix}", spec.dtype, spec.shape) for spec in specs)
        found[name] = _Draft(None, (), (group,), choice.layer, made=True)
    if not layers:
        raise UsageError(
            f"kv_cache: fp8: no attention with a k_proj or qkv_proj was found in {selection.stack}",
            remedy="set kv_cache: none",
        )
    return found


def refuse_left_over(checkpoint: Checkpoint, selection: Selection) -> None:
    """Scales beside weights that are plain numbers: a server would multiply by them, or refuse them.

    Raises:
        SourceError: with the first of them.
    """
    found = []
    for name, tensor in checkpoint.tensors.items():
        weight = checkpoint.tensors.get(f"{name.rpartition('.')[0]}.weight")
        if weight is None or weight.dtype not in FLOAT_DTYPES or not is_weight_scale(tensor):
            continue
        if selection.choices[weight.name].role in ("linear", "ignored", "router", "head"):
            found.append((name, weight.dtype))
    if found:
        name, dtype = found[0]
        raise SourceError(
            f"{name}: a scale is left over beside a {dtype} weight, {len(found)} in all",
            remedy="if the weights are dequantized, save the checkpoint without these scales; else name the original",
        )


def left_over_note(actions: Mapping[str, TensorAction], calibrated: bool) -> str | None:
    """A sentence on KV scales that are dropped; None where there are none."""
    dropped = [name for name, action in actions.items() if action.reason == LEFT_OVER]
    if not dropped:
        return None
    instead = "calibration measures new ones" if calibrated else "a server would use them, whatever they were made for"
    return f"{len(dropped)} KV scales left over in the source are dropped, first {dropped[0]}: {instead}"


def _weight_drafts(checkpoint: Checkpoint, selection: Selection, backend: Backend) -> Iterator[_Draft]:
    for name, tensor in checkpoint.tensors.items():
        choice = selection.choices[name]
        reason = REASONS[choice.role]
        if choice.role == "tied head":
            yield _Draft(TensorAction(tensor, "drop", reason, choice.component, None, ()), (), (), choice.layer)
            continue
        if choice.layer is not None and is_cache_scale(tensor):
            yield _Draft(
                TensorAction(tensor, "drop", LEFT_OVER, choice.component, choice.layer, ()), (), (), choice.layer
            )
            continue
        if choice.role not in ("linear", "experts"):
            group = ((name, tensor.dtype, tensor.shape),)
            action = TensorAction(tensor, "copy", reason, choice.component, choice.layer, (name,))
            yield _Draft(action, (_Block(0, ()),), (group,), choice.layer)
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            wide = tensor.dtype == "F64"
            raise SourceError(
                f"{name}: a {tensor.dtype} weight; BF16, F16 and F32 are quantized here",
                remedy="save the model in one of these first" if wide else "use the original checkpoint",
            )
        if choice.role == "linear":
            rows, columns = tensor.shape
            blocks = [_Block(0, ((name.removesuffix(".weight"), rows, columns),))]
        else:
            block, _, kind = name.rpartition(".")
            layout = selection.expert_layouts[block]
            blocks = list(_expert_blocks(tensor, block, kind, layout))
        groups = []
        for part in blocks:
            for module, rows, columns in part.modules:
                specs = backend.format.outputs(tensor.dtype, rows, columns)
                groups.append(tuple((f"{module}.{spec.suffix}", spec.dtype, spec.shape) for spec in specs))
        names = tuple(output for group in groups for output, _, _ in group)
        action = TensorAction(tensor, "quantize", reason, choice.component, choice.layer, names)
        yield _Draft(action, tuple(blocks), tuple(groups), choice.layer, made=backend.weights_need_data)


def _expert_blocks(tensor: Tensor, block: str, kind: str, layout: ExpertLayout) -> Iterator[_Block]:
    size = tensor.nbytes // layout.experts
    for expert, modules in expert_modules(block, kind, layout):
        yield _Block(expert * size, tuple(modules), layout.transposed)


def lay_out(drafts: list[_Draft], limit: int) -> tuple[dict[str, OutputTensor], tuple[OutputShard, ...]]:
    """Give every output tensor its place: shards filled in source order, wide dtypes first in each.

    The order by width keeps every tensor aligned to its dtype without holes, as the safetensors library's own
    serializer does.
    """
    bins: list[list[tuple[str, str, tuple[int, ...], int]]] = [[]]
    filled = 0
    for draft in drafts:
        for group in draft.groups:
            sized = [(name, dtype, shape, _nbytes(dtype, shape)) for name, dtype, shape in group]
            total = sum(entry[3] for entry in sized)
            if bins[-1] and filled + total > limit:
                bins.append([])
                filled = 0
            bins[-1].extend(sized)
            filled += total
    outputs: dict[str, OutputTensor] = {}
    shards = []
    for index, entries in enumerate(bins):
        entries.sort(key=lambda entry: -DTYPE_BYTES[entry[1]])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, dtype, shape, nbytes in entries:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
            position += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        raw = len(text).to_bytes(8, "little") + text
        for name, dtype, shape, nbytes in entries:
            if name in outputs:
                raise SourceError(
                    f"{name}: two tensors of the result would have this name",
                    remedy="is it left over in the source from another tool? Save the checkpoint without it",
                )
            offset = len(raw) + header[name]["data_offsets"][0]
            outputs[name] = OutputTensor(name, dtype, shape, nbytes, index, offset)
        file = "model.safetensors" if len(bins) == 1 else f"model-{index + 1:05d}-of-{len(bins):05d}.safetensors"
        shards.append(OutputShard(file, raw, len(raw) + position))
    return outputs, tuple(shards)


def _nbytes(dtype: str, shape: Iterable[int]) -> int:
    count = DTYPE_BYTES[dtype]
    for n in shape:
        count *= n
    return count


def cut_into_pieces(drafts: list[_Draft], outputs: dict[str, OutputTensor]) -> Iterator[Piece]:
    """Cut the work into pieces of about PIECE_BYTES, in file order, and number their units."""
    unit, written = 0, 0
    for draft in drafts:
        for piece in _pieces_of(draft, outputs):
            size = piece.result_nbytes
            if written and written + size > UNIT_BYTES:
                unit, written = unit + 1, 0
            written += size
            yield _in_unit(piece, unit)


def _in_unit(piece: Piece, unit: int) -> Piece:
    return Piece(unit, *(getattr(piece, field) for field in Piece.__slots__[1:]))


def layer_units(
    checkpoint: Checkpoint,
    selection: Selection,
    backend: Backend,
    drafts: list[_Draft],
    outputs: dict[str, OutputTensor],
    first: int,
) -> Iterator[LayerUnit]:
    """The decoder layers as units, numbered from `first`."""
    by_layer: dict[int, list[_Draft]] = defaultdict(list)
    for draft in drafts:
        assert draft.layer is not None
        by_layer[draft.layer].append(draft)
    for index in sorted(by_layer):
        unit = first + index
        pieces = [_in_unit(p, unit) for d in by_layer[index] if not d.made for p in _pieces_of(d, outputs)]
        made = tuple(name for d in by_layer[index] if d.made for group in d.groups for name, _, _ in group)
        tensors = tuple(d.action.tensor for d in by_layer[index] if d.action is not None)
        label = f"{selection.stack}.{index}" if selection.stack else str(index)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        yield LayerUnit(unit, index, label, tensors, nbytes, tuple(pieces), made)


def _pieces_of(draft: _Draft, outputs: dict[str, OutputTensor]) -> Iterator[Piece]:
    assert draft.action is not None
    action, tensor = draft.action, draft.action.tensor
    label = action.component if action.layer is None else f"{action.component}.{action.layer}"
    width = DTYPE_BYTES[tensor.dtype]
    groups = iter(draft.groups)

    def piece(offset: int, nbytes: int, **rest: Any) -> Piece:
        return Piece(0, label, tensor.name, tensor.shard, tensor.offset + offset, nbytes, dtype=tensor.dtype, **rest)

    for block in draft.blocks:
        if not block.modules:
            ((name, _, _),) = next(groups)
            out = outputs[name]
            for start in range(0, max(tensor.nbytes, 1), PIECE_BYTES):
                size = min(PIECE_BYTES, tensor.nbytes - start)
                write = Write(0, size, out.shard, out.offset + start, name)
                yield piece(start, size, kind="copy", rows=0, columns=0, transposed=False, first_row=0, writes=(write,))
            continue
        rows, columns = sum(module[1] for module in block.modules), block.modules[0][2]
        modules = [(module[1], next(groups)) for module in block.modules]
        scale_width = DTYPE_BYTES[modules[0][1][1][1]]  # of the second tensor's dtype; see `Format.outputs`
        step = rows if block.transposed else max(1, PIECE_BYTES // (columns * width))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield piece(
                block.offset + first * columns * width,
                count * columns * width,
                kind="quantize",
                rows=count,
                columns=columns,
                transposed=block.transposed,
                first_row=first,
                writes=tuple(_quantized_writes(modules, outputs, first, count, columns, scale_width)),
            )


def _quantized_writes(
    modules: list[tuple[int, Any]], outputs: dict[str, OutputTensor], first: int, count: int, columns: int, width: int
) -> Iterator[Write]:
    """Where rows ``first .. first + count`` of stacked modules go; a piece's result is its scales, then the values."""
    top = 0
    for rows, (values_spec, scales_spec) in modules:
        begin, end = max(first, top), min(first + count, top + rows)
        if begin < end:
            values, scales = outputs[values_spec[0]], outputs[scales_spec[0]]
            yield Write(
                (begin - first) * width,
                (end - begin) * width,
                scales.shard,
                scales.offset + (begin - top) * width,
                scales.name,
            )
            yield Write(
                count * width + (begin - first) * columns,
                (end - begin) * columns,
                values.shard,
                values.offset + (begin - top) * columns,
                values.name,
            )
        top += rows


def check_accounts(
    checkpoint: Checkpoint,
    actions: dict[str, TensorAction],
    outputs: dict[str, OutputTensor],
    pieces: tuple[Piece, ...],
    layers: tuple[LayerUnit, ...],
) -> None:
    """Every source tensor has a action, every output byte one writer. A failure here is a mistake of this program."""
    for name in checkpoint.tensors:
        if name not in actions:
            raise SourceError(f"{name}: no action was found for this tensor", remedy="please report it")
    written: dict[str, int] = defaultdict(int)
    for piece in (*pieces, *(piece for layer in layers for piece in layer.pieces)):
        for write in piece.writes:
            written[write.tensor] += write.nbytes
    for name in (name for layer in layers for name in layer.made):
        written[name] += outputs[name].nbytes
    for name, output in outputs.items():
        if written[name] != output.nbytes:
            raise SourceError(
                f"{name}: {written[name]} of {output.nbytes} bytes have a source", remedy="please report it"
            )
