"""The plan: every source tensor's action and every output byte's place, before the first tensor is read.

Made from the config and the headers alone. A action is ``quantize``, ``copy`` or ``drop``, with a reason.
Output shards are laid out completely: the stream only fills in bytes. Pieces are what one thread reads,
computes and hands to the writer; units of pieces are what the journal records. A calibrated run has a unit a
decoder layer besides, and its plan holds the token batches too: they decide bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from pipeline import __version__
from pipeline.backends.base import Backend
from pipeline.backends.registry import choose_backend
from pipeline.checkpoint import directory
from pipeline.checkpoint.hub import hub_name
from pipeline.checkpoint.layout import OutputShard, OutputTensor
from pipeline.checkpoint.source import Checkpoint, SourceError, refuse_unusable_files
from pipeline.checkpoint.source_card import SourceCard, read_source_card
from pipeline.errors import UsageError
from pipeline.identity import Identity
from pipeline.machine.system import default_threads
from pipeline.model.completeness import FETCH, by_class, check_complete, refuse_adapters
from pipeline.model.ignore import IgnoreList
from pipeline.model.selection import TESTED_MODEL_TYPES, Selection, select
from pipeline.plan.calibration import CalibrationPlan, Prepare, calibration_warnings, plan_calibration, prepare
from pipeline.plan.identity import identity_of
from pipeline.plan.layout import (
    LayerUnit,
    Piece,
    TensorAction,
    check_accounts,
    cut_into_pieces,
    draft_outputs,
    lay_out,
    layer_units,
    left_over_note,
    refuse_left_over,
)
from pipeline.plan.quantized_source import refuse_quantized, refuse_quantized_parts
from pipeline.recipe.recipe import Recipe, not_yet_built

BASE_MEMORY = 80 << 20  # the process before its first buffer, measured with room to spare
TORCH_MEMORY = 1200 << 20  # with torch, transformers and the quantization libraries imported
CUDA_MEMORY = 3800 << 20  # and with CUDA's libraries loaded
TENSOR_MEMORY = 3 << 10  # what plan and journal keep of an output tensor; a mixture has tens of thousands


@dataclass(frozen=True)
class Plan:
    """See the module's text."""

    recipe: Recipe
    checkpoint: Checkpoint
    backend: Backend
    selection: Selection
    actions: dict[str, TensorAction]
    outputs: dict[str, OutputTensor]
    shards: tuple[OutputShard, ...]
    pieces: tuple[Piece, ...]  # of the data-free stream
    threads: int
    warnings: tuple[str, ...]
    calibration: CalibrationPlan | None = None
    source_card: SourceCard = field(default_factory=SourceCard)

    @property
    def layers(self) -> tuple[LayerUnit, ...]:
        """The decoder layers of a calibrated run; none where no data is needed."""
        return self.calibration.layers if self.calibration else ()

    @property
    def read_nbytes(self) -> int:
        """What a whole run reads of the source."""
        return sum(piece.nbytes for piece in self.pieces) + sum(layer.nbytes for layer in self.layers)

    @property
    def source_dtypes(self) -> frozenset[str]:
        """The dtypes of the source's tensors."""
        return frozenset(tensor.dtype for tensor in self.checkpoint.tensors.values())

    @cached_property
    def identity(self) -> Identity:
        """See `identity_of`; read from disk once, when a run first needs it."""
        dtypes = {action.tensor.dtype for action in self.actions.values() if action.action == "quantize"}
        versions = {"pipeline": __version__}
        versions.update((f"library.{name}", version) for name, version in self.backend.versions(dtypes).items())
        return identity_of(self.recipe, self.checkpoint, self.shards, versions, self.calibration, self.threads)

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
            dtypes = {a.tensor.dtype for a in self.actions.values() if a.action == "quantize"}
            return (TORCH_MEMORY if self.backend.imports_torch(dtypes) else BASE_MEMORY) + stream
        found, needs = self.calibration, self.calibration.needs
        on_host = 2 * needs.layer + 2 * needs.made + (needs.hidden if found.place == "host" else 0)
        if found.device.kind == "cuda":
            return CUDA_MEMORY + stream + on_host
        return TORCH_MEMORY + stream + on_host + needs.layer + needs.activations


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
    refuse_quantized(checkpoint)
    refuse_unusable_files(checkpoint)
    refuse_adapters(checkpoint)
    backend = choose_backend(recipe)
    selection = select(checkpoint, recipe.ignore)
    refuse_quantized_parts(checkpoint, selection, backend.format.weight_dtype)
    refuse_left_over(checkpoint, selection)
    incomplete = check_complete(checkpoint, selection)
    drafts = list(draft_outputs(checkpoint, selection, backend))
    outputs, shards = lay_out(drafts, recipe.shard_bytes)
    if recipe.kv_cache == "fp8" and not backend.attention_outputs():
        raise UsageError(
            f"kv_cache: fp8: backend {recipe.backend} makes no KV scales with scheme {recipe.scheme}",
            remedy="set kv_cache: none",
        )
    calibrated = backend.needs_data
    of_layers = [d for d in drafts if calibrated and d.layer is not None]
    pieces = tuple(cut_into_pieces([d for d in drafts if not calibrated or d.layer is None], outputs))
    layers = tuple(
        layer_units(checkpoint, selection, backend, of_layers, outputs, pieces[-1].unit + 1 if pieces else 0)
    )
    actions = {draft.action.tensor.name: draft.action for draft in drafts if draft.action is not None}
    check_accounts(checkpoint, actions, outputs, pieces, layers)
    _check_ignore(backend, selection, actions, outputs)
    threads = recipe.runtime.threads or default_threads()
    warnings = [*selection.warnings, *incomplete, *directory.notes(checkpoint.left_behind)]
    if note := left_over_note(actions, recipe.kv_cache == "fp8"):
        warnings.append(note)
    card = read_source_card(checkpoint.root)
    warnings += _card_warnings(recipe, checkpoint, card)
    calibration = None
    if calibrated:
        embedding = next(n for n, choice in selection.choices.items() if choice.role == "embedding")
        calibration = plan_calibration(recipe, checkpoint, layers, outputs, checkpoint.tensors[embedding], prepare)
        warnings += _hold_against_class(checkpoint, selection)
        warnings += calibration_warnings(recipe, checkpoint, calibration)
    else:
        if not checkpoint.config.get("architectures"):
            warnings.append("config.json names no architectures: vLLM does not load the result without them")
        if recipe.runtime.device == "cuda":
            warnings.append("runtime.device: cuda is not used: this path needs no data and the disk sets its pace")
        if recipe.runtime.work_directory is not None:
            warnings.append("runtime.work_directory is not used: this path writes no scratch files")
        if recipe.calibration is not None:
            warnings.append(f"calibration is not used: neither {recipe.scheme} weights nor kv_cache: none need data")
    return Plan(
        recipe,
        checkpoint,
        backend,
        selection,
        actions,
        outputs,
        shards,
        pieces,
        threads,
        tuple(warnings),
        calibration,
        card,
    )


def _card_warnings(recipe: Recipe, checkpoint: Checkpoint, card: SourceCard) -> list[str]:
    """What the model card will lack; of a source without a card only where the recipe says that it will be uploaded."""
    asked, warnings = recipe.card, []
    if card.problem is not None:
        warnings.append(
            f"the source's README.md: its front matter cannot be read ({card.problem}): the result's card takes no "
            "licence and language from it; the recipe's card section can name them"
        )
    if asked.repo_id is not None and asked.licence is None and card.license is None:
        warnings.append("the model card will name no licence: the source's has none; set card.licence")
    if asked.repo_id is not None and asked.base_model is None and hub_name(checkpoint)[0] is None:
        warnings.append("the model card cannot name what is quantized: the source is a directory; set card.base_model")
    if asked.repo_id is not None:
        found = {f"serve.extra: {key}": value for key, value in recipe.serve.extra.items()}
        found["the source's config.json: _name_or_path"] = checkpoint.config.get("_name_or_path")
        for where, value in found.items():
            if isinstance(value, str) and value.startswith(("/", "~/")):
                warnings.append(f"{where}: {value} is a path of a machine, and will be published")
    return warnings


def _hold_against_class(checkpoint: Checkpoint, selection: Selection) -> list[str]:
    """Ask transformers' own class what the source lacks: a calibrated run imports it anyway."""
    lacking = by_class(checkpoint, selection) or []
    if lacking and checkpoint.config.get("model_type") in TESTED_MODEL_TYPES:
        raise SourceError(f"{checkpoint.label}: {lacking[0]}", remedy=FETCH)
    return [f"{text}; is the checkpoint complete?" for text in lacking[:1]]


# --- layout ------------------------------------------------------------------------------------------


def _check_ignore(
    backend: Backend, selection: Selection, actions: dict[str, TensorAction], outputs: dict[str, OutputTensor]
) -> None:
    """The config's ignore list against the tensors that will stand beside it, before the first byte is read."""
    linears = {}
    for action in actions.values():
        role = selection.choices[action.tensor.name].role
        for name in action.outputs:
            output = outputs[name]
            linear = len(output.shape) == 2 and name.endswith(".weight") and role != "embedding"
            if linear or (role == "ignored" and len(output.shape) == 2):
                linears[name.removesuffix(".weight")] = output.dtype
    modules = {name.rpartition(".")[0] for name in outputs} | set(selection.kept_linears)
    section = backend.config_section(selection)
    problems = IgnoreList(section["ignore"], backend.format.ignore_globs).problems(
        linears, modules, backend.format.weight_dtype
    )
    if problems:
        raise SourceError(
            f"{problems[0].text} (and {len(problems) - 1} more)", remedy="please report it with the plan's --json"
        )
