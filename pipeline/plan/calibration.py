"""What runs through the layers while calibrating, on what, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.calibration.batches import Batches, Encoded, encode, load_tokenizer, make_batches
from pipeline.calibration.captions import CaptionSet, load_captions
from pipeline.calibration.placement import Device, Needs, Place, choose_device, choose_place, import_libraries
from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.layout import OutputTensor
from pipeline.checkpoint.source import FLOAT_DTYPES, Checkpoint, SourceError, Tensor
from pipeline.errors import UsageError
from pipeline.model.skeleton import model_class
from pipeline.plan.layout import LayerUnit
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import Calibration
from pipeline.units import parse_size

FEW_TOKENS = 1000  # below this, amax is that of a few sentences
Prepare = Callable[[Calibration, Path], tuple[CaptionSet, Batches]]


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


def prepare(calibration: Calibration, root: Path) -> tuple[CaptionSet, Batches]:
    """The captions that a recipe asks for, and their batches, by the tokenizer in `root`."""
    captions = load_captions(calibration)
    encoded = encode(captions.texts, root, calibration.template)
    batches = make_batches(encoded.sequences, calibration.max_length, calibration.batch_tokens)
    return captions, replace(batches, notes=tuple(_notes(captions, encoded)))


def _notes(captions: CaptionSet, encoded: Encoded) -> Iterator[str]:
    """What was done about captions that hold special tokens."""
    if not encoded.special:
        return
    index = min(encoded.special, key=lambda each: captions.numbers[each])
    yield (
        f"special tokens written in captions are encoded as plain text: {len(encoded.special)} of "
        f"{len(captions.texts)} captions, first caption {captions.numbers[index]}, with {encoded.special[index]}: "
        f"{captions.texts[index][:60]!r}"
    )


def plan_calibration(
    recipe: Recipe,
    checkpoint: Checkpoint,
    layers: tuple[LayerUnit, ...],
    outputs: Mapping[str, OutputTensor],
    embedding: Tensor,
    prepare: Prepare,
) -> CalibrationPlan:
    """Captions, batches, device and the place of the activation cache of a calibrated run.

    Args:
        recipe: validated, with a calibration.
        checkpoint: the source.
        layers: its decoder layers.
        outputs: what the run writes.
        embedding: the source's, whose rows are the tokens that the model knows.
        prepare: makes captions and batches.

    Raises:
        SourceError: transformers has no class for it, or the tokenizer makes tokens that the embedding does not hold.
        UsageError: a caption has more tokens than the model has positions, or `runtime` asks for what is not here.
        OutOfMemory: not even one layer fits the device.
        DiskFull: the activation cache has to be a file, and the drive is too small for it.
    """
    assert recipe.calibration is not None, "the recipe's own check asks for it"
    imports = import_libraries()
    model_class(checkpoint)
    captions, batches = prepare(recipe.calibration, checkpoint.root)
    _check_ids(checkpoint, embedding, captions, batches)
    text = text_config(checkpoint.config)
    hidden = int(text.get("hidden_size") or 0) or _hidden_size(layers)
    limit = text.get("max_position_embeddings")
    if isinstance(limit, int) and batches.longest > limit:
        raise UsageError(
            f"calibration.max_length: a caption has {batches.longest} tokens, the model {limit} positions",
            remedy="lower it",
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


def _check_ids(checkpoint: Checkpoint, embedding: Tensor, captions: CaptionSet, batches: Batches) -> None:
    """Tokens that were added to a tokenizer, and not to the model."""
    rows, highest = embedding.shape[0], batches.highest
    if highest < rows:
        return
    token = str(load_tokenizer(checkpoint.root).convert_ids_to_tokens(highest))
    index = next((index for index, text in enumerate(captions.texts) if token in text), None)
    where = f" in caption {captions.numbers[index]} ({captions.texts[index][:60]!r})" if index is not None else ""
    raise SourceError(
        f"{embedding.name}: it has {rows:,} rows, and the tokenizer makes token {highest} ({token}){where}",
        remedy="the tokenizer belongs to another model, or was given tokens that this one was not: calibrate on "
        "captions without them",
    )


def _hidden_size(layers: tuple[LayerUnit, ...]) -> int:
    return min(shape for tensor in layers[0].tensors for shape in tensor.shape if len(tensor.shape) == 2)


def calibration_warnings(recipe: Recipe, checkpoint: Checkpoint, calibration: CalibrationPlan) -> list[str]:
    """What a careful user should know of the captions and the dtypes that a calibration runs with."""
    batches = calibration.batches
    found = list(batches.notes)
    if batches.tokens < FEW_TOKENS:
        found.append(
            f"calibration runs on {batches.tokens:,} tokens ({batches.samples} captions): what is served will "
            "exceed the amax of so few; take some hundred captions or more"
        )
    if batches.cut:
        found.append(
            f"{batches.cut} of {batches.samples} captions were cut at calibration.max_length: "
            f"{recipe.calibration.max_length if recipe.calibration else 0} tokens"
        )
    dtypes = {tensor.dtype for layer in calibration.layers for tensor in layer.tensors if len(tensor.shape) > 1}
    if other := sorted(dtypes & {*FLOAT_DTYPES} - {"BF16"}):
        found.append(f"weights in {', '.join(other)} run in BF16 while amax is collected")
    return found
