"""The plan: every source tensor's fate and every output byte's place, before the first tensor is read.

Made from the config and the headers alone. A fate is ``quantize``, ``copy`` or ``drop``, with a reason.
Output shards are laid out completely: the stream only fills in bytes. Pieces are what one thread reads,
computes and hands to the writer; units of pieces are what the journal records. A calibrated run has a unit a
decoder layer besides, and its plan holds the token batches too: they decide bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline import __version__
from pipeline.backends.base import Backend, CalibratedBackend
from pipeline.backends.llmcompressor import FP8Dynamic, FP8DynamicKV
from pipeline.backends.modelopt import ModelOptFP8
from pipeline.calibration.batches import Batches, make_batches, tokenize
from pipeline.calibration.captions import CaptionSet, load_captions
from pipeline.calibration.placement import Device, Needs, Place, choose_device, choose_place, import_libraries
from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.source import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, SourceError, Tensor
from pipeline.errors import DiskFull, TooLarge, UsageError
from pipeline.model.ignore import IgnoreList
from pipeline.model.selection import REASONS, ExpertLayout, Selection, attention_prefix, expert_modules, select
from pipeline.recipe.recipe import Recipe, not_yet_built
from pipeline.recipe.sections import Calibration
from pipeline.units import parse_size

PIECE_BYTES = 16 << 20  # of source: stays in the last-level cache between read, cast and write
UNIT_BYTES = 128 << 20  # of output: what a kill can cost
BASE_MEMORY = 80 << 20  # the process before its first buffer, measured with room to spare
TORCH_MEMORY = 1200 << 20  # with torch, transformers and the quantization libraries imported
CUDA_MEMORY = 3800 << 20  # and with CUDA's libraries loaded
TENSOR_MEMORY = 3 << 10  # what plan and journal keep of an output tensor; a mixture has tens of thousands

Fate = Literal["quantize", "copy", "drop"]
Prepare = Callable[[Calibration, Path], tuple[CaptionSet, Batches]]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the result: its place in output shard `shard`, `offset` from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class OutputShard:
    """A file of the result: its whole header is known."""

    name: str
    header: bytes  # with the length prefix
    size: int


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
    (``columns x rows`` if `transposed`), the result is its scales, then its codes.
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
class TensorFate:
    """What happens to one source tensor, and why."""

    tensor: Tensor
    fate: Fate
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
class CalibrationPlan:
    """What runs through the layers, and on what."""

    captions: CaptionSet
    batches: Batches
    device: Device
    place: Place
    place_why: str
    needs: Needs
    layers: tuple[LayerUnit, ...]
    imports: float  # seconds that importing torch and transformers took


@dataclass(frozen=True)
class Plan:
    """See the module's text."""

    recipe: Recipe
    checkpoint: Checkpoint
    backend: Backend
    selection: Selection
    fates: dict[str, TensorFate]
    outputs: dict[str, OutputTensor]
    shards: tuple[OutputShard, ...]
    pieces: tuple[Piece, ...]  # of the data-free stream
    threads: int
    warnings: tuple[str, ...]
    calibration: CalibrationPlan | None = None

    @property
    def layers(self) -> tuple[LayerUnit, ...]:
        """The decoder layers of a calibrated run; none where no data is needed."""
        return self.calibration.layers if self.calibration else ()

    @property
    def read_nbytes(self) -> int:
        """What a whole run reads of the source."""
        return sum(piece.nbytes for piece in self.pieces) + sum(layer.nbytes for layer in self.layers)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See `_identity`; read from disk once, when a run first needs it."""
        found: dict[str, Any] = json.loads(json.dumps(_identity(self)))  # as a journal gives it back
        return found

    @property
    def output_nbytes(self) -> int:
        """Length of all output shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def units(self) -> int:
        """How many units the journal will hold."""
        return self.piece_units + len(self.layers)

    @property
    def piece_units(self) -> int:
        """How many of them belong to the data-free stream; they come first."""
        return self.pieces[-1].unit + 1 if self.pieces else 0

    @property
    def in_flight(self) -> int:
        """Pieces in memory at once: one a thread, and a few read ahead and waiting for the disk."""
        return self.threads + 5

    @property
    def peak_memory(self) -> int:
        """An upper bound in bytes: buffers for the largest piece, as read, as transposed and as written, in flight."""
        pieces = [*self.pieces, *(piece for layer in self.layers for piece in layer.pieces)]
        largest = max((max(p.nbytes, p.result_nbytes) for p in pieces), default=0)
        buffers = 3 if any(p.transposed for p in pieces) else 2
        stream = len(self.outputs) * TENSOR_MEMORY + self.in_flight * largest * buffers
        if self.calibration is None:
            return BASE_MEMORY + stream
        found, needs = self.calibration, self.calibration.needs
        on_host = 2 * needs.layer + 2 * needs.made + (needs.hidden if found.place == "host" else 0)
        if found.device.kind == "cuda":
            return CUDA_MEMORY + stream + on_host
        return TORCH_MEMORY + stream + on_host + needs.layer + needs.activations


def prepare(calibration: Calibration, root: Path) -> tuple[CaptionSet, Batches]:
    """The captions that a recipe asks for, and their batches, by the tokenizer in `root`."""
    captions = load_captions(calibration)
    sequences = tokenize(captions.texts, root, calibration.template)
    return captions, make_batches(sequences, calibration.max_length, calibration.batch_tokens)


def make_plan(recipe: Recipe, checkpoint: Checkpoint, prepare: Prepare = prepare) -> Plan:
    """Decide everything.

    Args:
        recipe: validated.
        checkpoint: what it names.
        prepare: makes captions and batches; one that remembers saves seconds where many plans ask for the same.

    Raises:
        UsageError: the recipe asks for what this checkpoint, or this version, cannot give.
        SourceError: the checkpoint cannot be converted; the text says what to do.
    """
    if missing := not_yet_built(recipe):
        raise UsageError("\n".join(missing))
    _refuse_quantized(checkpoint)
    backend = choose_backend(recipe)
    selection = select(checkpoint, recipe.ignore)
    drafts = list(_draft(checkpoint, selection, backend))
    outputs, shards = _lay_out(drafts, recipe.shard_bytes)
    calibrated = isinstance(backend, CalibratedBackend)
    of_layers = [d for d in drafts if calibrated and d.layer is not None]
    pieces = tuple(_cut([d for d in drafts if not calibrated or d.layer is None], outputs))
    layers = tuple(_layers(checkpoint, selection, backend, of_layers, outputs, pieces[-1].unit + 1 if pieces else 0))
    fates = {draft.fate.tensor.name: draft.fate for draft in drafts if draft.fate is not None}
    _check_accounts(checkpoint, fates, outputs, pieces, layers)
    _check_ignore(backend, selection, fates, outputs)
    threads = recipe.runtime.threads or min(8, os.cpu_count() or 1)
    warnings = list(selection.warnings)
    calibration = None
    if calibrated:
        calibration = _plan_calibration(recipe, checkpoint, layers, outputs, prepare)
        warnings += _calibration_warnings(recipe, checkpoint, calibration)
    else:
        if recipe.runtime.device == "cuda":
            warnings.append("runtime.device: cuda is not used: this path needs no data and the disk sets its pace")
        if recipe.runtime.work_directory is not None:
            warnings.append("runtime.work_directory is not used: this path writes no scratch files")
        if recipe.calibration is not None:
            warnings.append("calibration is not used: neither fp8_dynamic weights nor kv_cache: none need data")
    return Plan(
        recipe, checkpoint, backend, selection, fates, outputs, shards, pieces, threads, tuple(warnings), calibration
    )


def choose_backend(recipe: Recipe) -> Backend:
    """The backend that carries out a recipe's scheme."""
    if recipe.backend == "modelopt":
        options = recipe.backend_options
        return ModelOptFP8(recipe.kv_cache == "fp8", options.exact, options.balance)
    return FP8DynamicKV() if recipe.kv_cache == "fp8" else FP8Dynamic()


def _plan_calibration(
    recipe: Recipe,
    checkpoint: Checkpoint,
    layers: tuple[LayerUnit, ...],
    outputs: Mapping[str, OutputTensor],
    prepare: Prepare,
) -> CalibrationPlan:
    assert recipe.calibration is not None, "the recipe's own check asks for it"
    imports = import_libraries()
    captions, batches = prepare(recipe.calibration, checkpoint.root)
    text = text_config(checkpoint.config)
    hidden = int(text.get("hidden_size") or 0) or _hidden_size(layers)
    limit = text.get("max_position_embeddings")
    if isinstance(limit, int) and batches.longest > limit:
        raise UsageError(
            f"calibration.max_length: a caption has {batches.longest} tokens, the model {limit} positions; lower it"
        )
    widest = max(shape for layer in layers for t in layer.tensors for shape in t.shape if len(t.shape) == 2)
    tokens = max(batch.tokens for batch in batches.batches)
    needs = Needs(
        layer=max(layer.nbytes for layer in layers),
        made=max(layer.result_nbytes(outputs) for layer in layers),
        hidden=batches.tokens * hidden * 2,
        activations=tokens * (4 * widest + 12 * hidden) * 2,
    )
    limit = recipe.runtime.device_memory
    device = choose_device(recipe.runtime.device, parse_size(limit) if limit else None)
    output = Path(recipe.output).expanduser().absolute()
    work = Path(recipe.runtime.work_directory).expanduser() if recipe.runtime.work_directory else output.parent
    place, why = choose_place(recipe.runtime.hidden_states, device, needs, work)
    return CalibrationPlan(captions, batches, device, place, why, needs, layers, imports)


def _hidden_size(layers: tuple[LayerUnit, ...]) -> int:
    return min(shape for tensor in layers[0].tensors for shape in tensor.shape if len(tensor.shape) == 2)


def _calibration_warnings(recipe: Recipe, checkpoint: Checkpoint, calibration: CalibrationPlan) -> list[str]:
    found = []
    batches = calibration.batches
    if batches.cut:
        found.append(
            f"{batches.cut} of {batches.samples} captions were cut at calibration.max_length: "
            f"{recipe.calibration.max_length if recipe.calibration else 0} tokens"
        )
    dtypes = {tensor.dtype for layer in calibration.layers for tensor in layer.tensors if len(tensor.shape) > 1}
    if other := sorted(dtypes - {"BF16"}):
        found.append(f"weights in {', '.join(other)} run in BF16 while ranges are measured")
    return found


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    section = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    for part in ("text_config", "llm_config", "language_config"):
        nested = checkpoint.config.get(part)
        section = section or (nested.get("quantization_config") if isinstance(nested, dict) else None)
    if section:
        method = section.get("quant_method", "?") if isinstance(section, dict) else "?"
        raise SourceError(
            f"{checkpoint.label}: this checkpoint is quantized already ({method}); a second rounding only loses: "
            "name the BF16 original as model.source"
        )


# --- fates -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """A contiguous range of a source tensor that is read as one array, and the modules it becomes."""

    offset: int  # from the tensor's first byte
    modules: tuple[tuple[str, int, int], ...]  # module, rows, columns, one under the other; empty: a copy
    transposed: bool = False


@dataclass(frozen=True)
class _Draft:
    fate: TensorFate | None  # None: no source tensor becomes this; the backend makes it
    blocks: tuple[_Block, ...]
    # for each group that must share a shard: (name, dtype, shape)
    groups: tuple[tuple[tuple[str, str, tuple[int, ...]], ...], ...]
    layer: int | None = None
    made: bool = False  # by the backend after calibration, not from the source's bytes alone


def _draft(checkpoint: Checkpoint, selection: Selection, backend: Backend) -> Iterator[_Draft]:
    caches = _cache_drafts(selection, backend) if isinstance(backend, CalibratedBackend) else {}
    for draft in _weight_drafts(checkpoint, selection, backend):
        yield draft
        assert draft.fate is not None
        if (more := caches.get(draft.fate.tensor.name)) is not None:
            yield more


def _cache_drafts(selection: Selection, backend: CalibratedBackend) -> dict[str, _Draft]:
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
            f"kv_cache: fp8: no attention with a k_proj or qkv_proj was found in {selection.stack}; set kv_cache: none"
        )
    return found


def _weight_drafts(checkpoint: Checkpoint, selection: Selection, backend: Backend) -> Iterator[_Draft]:
    calibrated = isinstance(backend, CalibratedBackend) and not hasattr(backend, "quantizer")
    for name, tensor in checkpoint.tensors.items():
        choice = selection.choices[name]
        reason = REASONS[choice.role]
        if choice.role == "tied head":
            yield _Draft(TensorFate(tensor, "drop", reason, choice.component, None, ()), (), (), choice.layer)
            continue
        if choice.role not in ("linear", "experts"):
            group = ((name, tensor.dtype, tensor.shape),)
            fate = TensorFate(tensor, "copy", reason, choice.component, choice.layer, (name,))
            yield _Draft(fate, (_Block(0, ()),), (group,), choice.layer)
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            raise SourceError(
                f"{name}: a {tensor.dtype} weight; BF16, F16 and F32 are quantized here, use the original checkpoint"
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
                specs = backend.outputs(tensor.dtype, rows, columns)
                groups.append(tuple((f"{module}.{spec.suffix}", spec.dtype, spec.shape) for spec in specs))
        names = tuple(output for group in groups for output, _, _ in group)
        fate = TensorFate(tensor, "quantize", reason, choice.component, choice.layer, names)
        yield _Draft(fate, tuple(blocks), tuple(groups), choice.layer, made=calibrated)


def _expert_blocks(tensor: Tensor, block: str, kind: str, layout: ExpertLayout) -> Iterator[_Block]:
    size = tensor.nbytes // layout.experts
    for expert, modules in expert_modules(block, kind, layout):
        yield _Block(expert * size, tuple(modules), layout.transposed)


# --- layout ------------------------------------------------------------------------------------------


def _lay_out(drafts: list[_Draft], limit: int) -> tuple[dict[str, OutputTensor], tuple[OutputShard, ...]]:
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
                raise SourceError(f"{name}: two source tensors would become this one")
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


def _cut(drafts: list[_Draft], outputs: dict[str, OutputTensor]) -> Iterator[Piece]:
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


def _layers(
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
        tensors = tuple(d.fate.tensor for d in by_layer[index] if d.fate is not None)
        label = f"{selection.stack}.{index}" if selection.stack else str(index)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        yield LayerUnit(unit, index, label, tensors, nbytes, tuple(pieces), made)


def _pieces_of(draft: _Draft, outputs: dict[str, OutputTensor]) -> Iterator[Piece]:
    assert draft.fate is not None
    fate, tensor = draft.fate, draft.fate.tensor
    label = fate.component if fate.layer is None else f"{fate.component}.{fate.layer}"
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
                writes=tuple(_quantized_writes(modules, outputs, first, count, columns, width)),
            )


def _quantized_writes(
    modules: list[tuple[int, Any]], outputs: dict[str, OutputTensor], first: int, count: int, columns: int, width: int
) -> Iterator[Write]:
    """Where rows ``first .. first + count`` of stacked modules go: a piece's result is its scales, then its codes."""
    top = 0
    for rows, (codes_spec, scales_spec) in modules:
        begin, end = max(first, top), min(first + count, top + rows)
        if begin < end:
            codes, scales = outputs[codes_spec[0]], outputs[scales_spec[0]]
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
                codes.shard,
                codes.offset + (begin - top) * columns,
                codes.name,
            )
        top += rows


def _check_accounts(
    checkpoint: Checkpoint,
    fates: dict[str, TensorFate],
    outputs: dict[str, OutputTensor],
    pieces: tuple[Piece, ...],
    layers: tuple[LayerUnit, ...],
) -> None:
    """Every source tensor has a fate, every output byte one writer. A failure here is a mistake of this program."""
    for name in checkpoint.tensors:
        if name not in fates:
            raise SourceError(f"{name}: no fate was found for this tensor; please report it")
    written: dict[str, int] = defaultdict(int)
    for piece in (*pieces, *(piece for layer in layers for piece in layer.pieces)):
        for write in piece.writes:
            written[write.tensor] += write.nbytes
    for name in (name for layer in layers for name in layer.made):
        written[name] += outputs[name].nbytes
    for name, output in outputs.items():
        if written[name] != output.nbytes:
            raise SourceError(f"{name}: {written[name]} of {output.nbytes} bytes have a source; please report it")


def _check_ignore(
    backend: Backend, selection: Selection, fates: dict[str, TensorFate], outputs: dict[str, OutputTensor]
) -> None:
    """The config's ignore list against the tensors that will stand beside it, before the first byte is read."""
    linears = {}
    for fate in fates.values():
        role = selection.choices[fate.tensor.name].role
        for name in fate.outputs:
            output = outputs[name]
            linear = len(output.shape) == 2 and name.endswith(".weight") and role != "embedding"
            if linear or (role == "ignored" and len(output.shape) == 2):
                linears[name.removesuffix(".weight")] = output.dtype
    modules = {name.rpartition(".")[0] for name in outputs} | set(selection.kept_linears)
    section = backend.config_section(selection)
    problems = IgnoreList(section["ignore"], section["quant_method"]).problems(linears, modules)
    if problems:
        raise SourceError(f"{problems[0]} (and {len(problems) - 1} more); please report it with the plan's --json")


# --- identity ----------------------------------------------------------------------------------------


def _identity(plan: Plan) -> dict[str, Any]:
    """What must be the same for a run to go on where another stopped. Flat, so that differences have names.

    A directory's content is known by its path, sizes, mtimes, headers and a few sampled blocks a shard, since
    another fine-tune of the same model has the same headers, and may have been unpacked with the same mtimes; a
    hub's commit names its content.
    """
    recipe, checkpoint = plan.recipe, plan.checkpoint
    asked = recipe.model_dump(include={"backend", "scheme", "kv_cache", "ignore", "backend_options"})
    found: dict[str, Any] = {"pipeline": __version__, **asked, "shard_size": recipe.shard_bytes}
    on_hub = checkpoint.revision is not None
    found["source"] = checkpoint.label if on_hub else str(checkpoint.root.resolve())
    found["source.revision"] = checkpoint.revision
    for shard in checkpoint.shards:
        sample = None if on_hub or shard.path is None else _sample(shard.path, shard.size)
        found[f"source.{shard.name}"] = [shard.size, shard.header_sha256, shard.modified, sample]
    for name in checkpoint.sidecars:
        status = (checkpoint.root / name).stat()
        found[f"source.{name}"] = [status.st_size, 0 if on_hub else status.st_mtime_ns]
    dtypes = {fate.tensor.dtype for fate in plan.fates.values() if fate.fate == "quantize"}
    found.update((f"library.{name}", version) for name, version in plan.backend.versions(dtypes).items())
    found["layout"] = hashlib.sha256(b"".join(shard.header for shard in plan.shards)).hexdigest()
    found["units"] = [PIECE_BYTES, UNIT_BYTES]
    if plan.calibration is not None:  # what decides the bits of activations
        batches = plan.calibration.batches  # captions, seed, template: whatever gives the same batches is the same
        found["calibration.batches"] = [f"{batches.samples} captions, {batches.tokens} tokens", batches.digest]
        assert recipe.calibration is not None
        found["calibration.batch_tokens"] = recipe.calibration.batch_tokens
        found["device"] = plan.calibration.device.name
        if plan.calibration.device.kind == "cpu":
            found["threads"] = plan.threads
    return found


SAMPLES, SAMPLE_BYTES = 8, 4096


def _sample(path: Path, size: int) -> str:
    """SHA-256 over a few blocks spread over a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(1, SAMPLES + 1):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, size * number // (SAMPLES + 1)))
    return digest.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields in which two identities differ, with both values, for a person to read."""
    lines = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key.startswith("source.") and isinstance(old, list) and isinstance(new, list):
            lines.append(f"{key}: the file has changed")
        elif key == "layout":
            continue  # follows from another field
        else:
            lines.append(f"{key}: {_short(old)} then, {_short(new)} now")
    return lines or ["layout: the output's layout"]


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> frozenset[str]:
    """The names of the fields in which two identities differ."""
    return frozenset(key for key in set(before) | set(now) if before.get(key) != now.get(key))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- disk --------------------------------------------------------------------------------------------


def disk_need(plan: Plan) -> int:
    """Bytes that the output's drive must have for a whole run.

    Hidden states count where they go to the same drive: two generations while one is saved, and the file they wait in.
    """
    needed = plan.output_nbytes + (16 << 20)
    if plan.calibration is not None and plan.recipe.runtime.work_directory is None:
        needed += plan.calibration.needs.hidden * (3 if plan.calibration.place == "file" else 2)
    return needed


def written_already(partial: Path) -> int:
    """Bytes on the drive that a stopped run has taken for its shards."""
    found = 0
    for path in partial.glob("*.safetensors") if partial.is_dir() else ():
        try:
            found += path.stat().st_blocks * 512
        except FileNotFoundError:  # published, or thrown away, meanwhile
            continue
    return found


def check_disk(plan: Plan, output: Path, partial: Path) -> None:
    """See whether the result fits beside what a stopped run has written already.

    Raises:
        DiskFull: not now.
        TooLarge: the drive as a whole is smaller.
    """
    needed, have = disk_need(plan), written_already(partial)
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    if needed > usage.total:
        raise TooLarge(
            f"{place}: {size_text(needed)} needed for the result, the whole drive has {size_text(usage.total)}; "
            "choose another output"
        )
    if usage.free + have < needed:
        raise DiskFull(
            f"{place}: {size_text(usage.free + have)} free, {size_text(needed)} needed for the result; free "
            f"{size_text(needed - usage.free - have)}, or choose another output"
        )


def size_text(nbytes: float) -> str:
    """Decimal units, as drives and hubs count: ``3.86 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{int(nbytes)} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


# --- views -------------------------------------------------------------------------------------------


def summary(plan: Plan) -> list[dict[str, Any]]:
    """The plan in a few rows: what shares a fate, a reason and a part of the model, with counts and bytes."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for fate in plan.fates.values():
        key = (fate.component, fate.fate, fate.reason)
        row = rows.setdefault(
            key,
            {
                "component": fate.component,
                "fate": fate.fate,
                "reason": fate.reason,
                "tensors": 0,
                "source_bytes": 0,
                "output_bytes": 0,
            },
        )
        row["tensors"] += 1
        row["source_bytes"] += fate.tensor.nbytes
        row["output_bytes"] += sum(plan.outputs[name].nbytes for name in fate.outputs)
    return sorted(rows.values(), key=lambda row: (row["fate"] != "quantize", -row["source_bytes"]))


def _calibration_json(found: CalibrationPlan) -> dict[str, Any]:
    batches = found.batches
    return {
        "captions": found.captions.origin,
        "samples": batches.samples,
        "tokens": batches.tokens,
        "shortest": batches.shortest,
        "longest": batches.longest,
        "cut": batches.cut,
        "batches": len(batches.batches),
        "computed_over_real_tokens": batches.padding,
        "device": found.device.name,
        "hidden_states": {"place": found.place, "bytes": found.needs.hidden},
        "layer_bytes": found.needs.layer,
        "forwards": len(found.layers) * len(batches.batches),
    }


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain data: every tensor, every place."""
    source = plan.checkpoint
    return {
        "source": {
            "name": source.label,
            "revision": source.revision,
            "model_type": source.config.get("model_type"),
            "shards": len(source.shards),
            "tensors": len(source.tensors),
            "bytes": source.nbytes,
        },
        "output": {
            "directory": plan.recipe.output,
            "bytes": plan.output_nbytes,
            "shards": [{"file": shard.name, "bytes": shard.size} for shard in plan.shards],
        },
        "language_model": {
            "root": plan.selection.root,
            "layers": plan.selection.layers,
            "outside": list(plan.selection.outside),
        },
        "summary": summary(plan),
        "units": plan.units,
        "threads": plan.threads,
        "peak_memory_bytes": plan.peak_memory,
        "carried": list(source.sidecars),
        "left_behind": [{"file": name, "reason": reason} for name, reason in source.left_behind],
        "warnings": list(plan.warnings),
        "calibration": None if plan.calibration is None else _calibration_json(plan.calibration),
        "tensors": [
            {
                "name": fate.tensor.name,
                "dtype": fate.tensor.dtype,
                "shape": list(fate.tensor.shape),
                "bytes": fate.tensor.nbytes,
                "fate": fate.fate,
                "reason": fate.reason,
                "component": fate.component,
                "layer": fate.layer,
                "outputs": [
                    {**asdict(plan.outputs[name]), "file": plan.shards[plan.outputs[name].shard].name}
                    for name in fate.outputs
                ],
            }
            for fate in plan.fates.values()
        ],
    }
