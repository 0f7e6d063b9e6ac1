"""What a source lacks, or has too much of: found from its headers and config, before any work.

Quantizing does not mind: a model without its head becomes a smaller model without its head. Whoever serves it then gets
no error and no sense, since a server fills what nothing fills with what memory held. `check_complete` needs no torch.
`by_class` asks transformers' own class, where that is imported anyway.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.source import Checkpoint, SourceError
from pipeline.library_messages import quiet
from pipeline.model.selection import TESTED_MODEL_TYPES, Selection

# PEFT's names (LoRA, AdaLoRA, DoRA, LoHa, LoKr, IA3, OFT, BOFT, VeRA), those of torchtune and MLX among them
ADAPTER = re.compile(
    r"^base_model\.model\.|(^|\.)(lora_([ABE]|embedding_[AB]|magnitude_vector|ranknum)|base_layer|modules_to_save"
    r"|original_module|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|ia3_l|oft_[rs]|oft_blocks|boft_[rs]"
    r"|vera_lambda_[bd])(\.|$)",
    re.IGNORECASE,
)
MERGE = (
    "merge the adapter first and name the merged model: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
    ".save_pretrained(NEW_DIR)"
)
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")  # of DDP, torch.compile and FSDP
GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
FETCH = "the checkpoint is incomplete, fetch or save it again"


def refuse_adapters(checkpoint: Checkpoint) -> None:
    """Refuse weights of an adapter that was never merged, and names of a wrapper around the model.

    Raises:
        SourceError: a tensor has such a name.
    """
    found = [name for name in checkpoint.tensors if ADAPTER.search(name)]
    if found:
        raise SourceError(
            f"{checkpoint.label}: {found[0]} belongs to an adapter (LoRA and the like) that was not merged into the "
            f"model, {len(found)} such tensors in all: no server takes these names",
            remedy=MERGE,
        )
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in checkpoint.tensors):
            raise SourceError(
                f"{checkpoint.label}: all tensors' names begin with {prefix!r}, which a wrapper around the model left: "
                "no server takes these names",
                remedy="save the model itself, without its wrapper",
            )


def check_complete(checkpoint: Checkpoint, selection: Selection) -> list[str]:
    """Hold the headers against the config and against each other.

    Args:
        checkpoint: a source, not a quantized result.
        selection: of it.

    Returns:
        What a careful user should know: what would be refused in a family that the tests know.

    Raises:
        SourceError: something is lacking, or more is there than the config counts.
    """
    _refuse_more_layers(checkpoint, selection)
    tested = checkpoint.config.get("model_type") in TESTED_MODEL_TYPES
    found = [*_vocabulary(checkpoint, selection), *_uneven(checkpoint, selection, tested)]
    found += [*_head(checkpoint, selection), *(_known_parts(checkpoint, selection) if tested else ())]
    if tested and found:
        text, remedy = found[0]
        raise SourceError(f"{checkpoint.label}: {text}", remedy=remedy)
    told = " ".join(selection.warnings)
    warnings = [f"{text}; is the checkpoint complete?" for text, _ in found if text.partition(",")[0] not in told]
    return [*warnings, *_other_layers(checkpoint, selection)]


Complaint = tuple[str, str]  # what is wrong, and what to do


def _kinds(checkpoint: Checkpoint, selection: Selection) -> dict[int, set[str]]:
    """By number, what the layers of the language model's stack hold, also those beyond the config's count."""
    prefix = f"{selection.stack}." if selection.stack else ""
    kinds: dict[int, set[str]] = defaultdict(set)
    for name in checkpoint.tensors:
        if match := re.match(rf"{re.escape(prefix)}(\d+)\.(.+)", name):
            kinds[int(match[1])].add(match[2])
    return kinds


def _refuse_more_layers(checkpoint: Checkpoint, selection: Selection) -> None:
    """Layers beyond the config's count that are like the counted ones belong to the model, or to another one.

    Layers for multi-token prediction are numbered on as well, and have parts of their own.
    """
    kinds = _kinds(checkpoint, selection)
    counted = [kinds[index] for index in range(selection.layers)]
    more = sorted(index for index, kind in kinds.items() if index >= selection.layers and kind in counted)
    if more:
        where = f"{selection.stack}.{more[0]}" if selection.stack else str(more[0])
        raise SourceError(
            f"{checkpoint.label}: config.json says num_hidden_layers {selection.layers}, but the shards hold {where}, "
            f"a layer like the others ({len(more)} such layers): a server runs without it, or refuses it",
            remedy=f"set num_hidden_layers to {more[-1] + 1} if it belongs to the model, or take its tensors out",
        )


def _other_layers(checkpoint: Checkpoint, selection: Selection) -> Iterator[str]:
    """A word on layers of another kind beyond the config's count, which stay as they are."""
    more = sorted(index for index in _kinds(checkpoint, selection) if index >= selection.layers)
    if more:
        where = f"{selection.stack}.{more[0]}" if selection.stack else str(more[0])
        yield (
            f"{where} is beyond num_hidden_layers ({selection.layers}) and of another kind, as layers for multi-token "
            "prediction are: it stays as it is"
        )


def _vocabulary(checkpoint: Checkpoint, selection: Selection) -> Iterator[Complaint]:
    """Embedding and head have a row for each of the config's tokens, no more: loaders refuse other shapes."""
    said = text_config(checkpoint.config).get("vocab_size")
    if type(said) is not int:
        return
    for name, choice in selection.choices.items():
        tensor = checkpoint.tensors[name]
        own = choice.role == "embedding" or (
            choice.role == "head" and f"{selection.root}.".startswith(name.removesuffix("lm_head.weight"))
        )
        if own and len(tensor.shape) == 2 and tensor.shape[0] != said:
            yield (
                f"{name} has {tensor.shape[0]} rows, but config.json says vocab_size {said}: vLLM and transformers "
                "refuse that of most models",
                f"set vocab_size to {tensor.shape[0]} if the model was resized for new tokens, or name the right "
                "config",
            )


def _uneven(checkpoint: Checkpoint, selection: Selection, tested: bool) -> Iterator[Complaint]:
    """A layer, a block or an expert that lacks a weight or a bias which others of its stack have, and has none instead.

    In parts outside the language model of families that are not known, blocks may differ by design.
    """
    stacks: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, tensor in checkpoint.tensors.items():
        match = re.match(r"(.*?)\.?\b(\d+)\.(.+)", name)
        if match and name.endswith((".weight", ".bias")) and 0 not in tensor.shape:
            stacks[match[1]][int(match[2])].add(match[3])
    for stack, entries in stacks.items():
        language = stack == selection.stack
        kinds = {index: kind for index, kind in entries.items() if not language or index < selection.layers}
        if not (language or (tested and _of_modules(kinds))):
            continue
        for full in sorted({frozenset(kind) for kind in kinds.values()}, key=len, reverse=True):
            for index, kind in sorted(kinds.items()):
                if kind < full:
                    yield f"{stack}.{index} has no {min(full - kind)}, as others beside it have", FETCH
                    return


def _of_modules(kinds: Mapping[int, set[str]]) -> bool:
    """Whether entries of a stack are made of modules (``norm.weight``); those of a Sequential may differ by design."""
    return all(any("." in part for part in kind) for kind in kinds.values())


def _head(checkpoint: Checkpoint, selection: Selection) -> Iterator[Complaint]:
    """A model that generates has a head, unless it is tied."""
    config = checkpoint.config
    parts = (config, text_config(config))
    said = {part["tie_word_embeddings"] for part in parts if isinstance(part.get("tie_word_embeddings"), bool)}
    named = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    headless = not any(choice.role in ("head", "tied head") for choice in selection.choices.values())
    if headless and said == {False} and any(name.endswith(GENERATES) for name in named):
        yield (
            "there is no lm_head.weight, and config.json says that it is not tied (tie_word_embeddings: false)",
            "the checkpoint is incomplete, fetch or save it again; or set tie_word_embeddings to true if the head is "
            "the embedding",
        )


def _known_parts(checkpoint: Checkpoint, selection: Selection) -> Iterator[Complaint]:
    """What every family that the tests know has: a final norm, weights beside biases, q/k/v alike, a vision part."""
    prefix = f"{selection.root}." if selection.root else ""
    names = checkpoint.tensors
    if not any(n.startswith(prefix) and re.fullmatch(r"[a-z_]*norm\.weight", n.removeprefix(prefix)) for n in names):
        yield f"there is no final norm ({prefix}norm.weight)", FETCH
    for name in names:
        owner = name.removesuffix(".bias")
        if name.endswith(".bias") and f"{owner}.weight" not in names:
            yield f"there is no {owner}.weight beside {name}", FETCH
        found = re.match(r"(.+)\.[qkv]_proj\.bias$", name) if selection.choices[name].layer is not None else None
        lost = [f"{found[1]}.{key}_proj.bias" for key in "qkv" if found and f"{found[1]}.{key}_proj.bias" not in names]
        if lost:
            yield f"there is no {lost[0]} beside {name}", FETCH
    if isinstance(checkpoint.config.get("vision_config"), dict) and not selection.outside:
        yield "config.json has a vision_config, but the shards hold nothing outside the language model", FETCH


def by_class(checkpoint: Checkpoint, selection: Selection, strict: bool = False) -> list[str] | None:
    """What transformers' own class for the checkpoint misses in it. Imports torch and transformers; reads headers.

    Args:
        checkpoint: a source.
        selection: of it.
        strict: name also what the class does not know and would leave aside.

    Returns:
        Sentences, the worst first; none where it is complete; None where transformers does not know the class, or
        cannot build it.
    """
    import torch
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    from pipeline.model.skeleton import Skeleton

    try:
        skeleton = Skeleton.build(checkpoint, selection, torch.device("cpu"))
    except SourceError:
        return None
    model: Any = skeleton.model
    shapes = {
        name: torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        for name, tensor in checkpoint.tensors.items()
    }
    wanted = LoadStateDictConfig(device_map={"": "meta"}, dtype=torch.bfloat16, weight_mapping=skeleton.conversions())
    try:
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(model, shapes, wanted, None)
    except Exception:  # a private function of transformers' that may raise what it likes: then it has no word on this
        return None
    kind = type(model).__name__
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    optional = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]
    missing = [
        name
        for name in sorted(info.missing_keys)
        if not (name in tied and tied[name] not in info.missing_keys)
        and not any(re.search(pattern, name) for pattern in optional)
    ]
    said = [f"nothing in the shards becomes {name} of {kind}, {len(missing)} in all" for name in missing[:1]]
    said += [f"{name}: {list(found)} where {kind} has {list(own)}" for name, found, own in sorted(info.mismatched_keys)]
    if strict:
        aside = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"inv_freq$"]
        unknown = [n for n in sorted(info.unexpected_keys) if not any(re.search(pattern, n) for pattern in aside)]
        said += [f"{name}: {kind} has no such parameter, {len(unknown)} in all" for name in unknown[:1]]
        said += [str(error).splitlines()[0] for error in info.conversion_errors.values()]
    return said
