"""What is the language model and what is not, found from the config and the shards' headers.

No list of model names decides: the language model is the stack of decoder layers whose number the
config's text part gives, standing beside an embedding of vocabulary size. Its 2-D weights are quantized,
except routers and gates; everything else stays as it is. tests/test_selection.py holds this equal to
what the transformers classes say, family by family.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.checkpoint.config import head_ties, text_config
from pipeline.checkpoint.reader import same_bytes
from pipeline.checkpoint.source import Checkpoint, SourceError, Tensor
from pipeline.model.ignore import ignored_modules, refuse_split_groups

# Families whose selection the tests compare with transformers. Others work by the same rules, with a warning.
TESTED_MODEL_TYPES = frozenset({
    "gemma3", "gemma3_text", "internvl", "llama", "llava", "mistral", "mistral3", "mixtral", "phi3", "qwen2",
    "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe",
})  # fmt: skip

# 3-D expert tensors say nothing of what lies where inside; only models whose modeling code was read are listed.
# gate first, up second along the fused dimension; both layouts, [experts, in, out] on the hub and [experts, out, in]
# as transformers 5 saves, are told apart by their shapes.
FUSED_EXPERTS = frozenset({"qwen3_vl_moe"})


Role = Literal[
    "linear", "experts", "ignored", "router", "norm", "embedding", "head", "tied head", "outside", "other"
]  # fmt: skip

REASONS: dict[Role, str] = {
    "linear": "linear layer of the language model",
    "experts": "fused experts of the language model",
    "ignored": "the recipe's ignore",
    "router": "router or gate: it chooses experts, its errors cost most",
    "norm": "norm or bias",
    "embedding": "embedding",
    "head": "output head",
    "tied head": "tied to the embedding (tie_word_embeddings), whose bytes these are: loaders use that one",
    "outside": "outside the language model",
    "other": "in the language model, but no linear weight",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What one source tensor is.

    Attributes:
        role: decides its action; `REASONS` says why.
        layer: decoder layer index, or None.
        component: for tensors outside the decoder stack, the part of the model, e.g. ``model.visual``.
    """

    role: Role
    layer: int | None
    component: str


@dataclass(frozen=True)
class ExpertLayout:
    """How a layer's fused expert tensors lie: ``transposed`` is [experts, in, out], the hub's."""

    experts: int
    hidden: int
    intermediate: int
    transposed: bool


@dataclass(frozen=True)
class Selection:
    """The language model of a checkpoint.

    Attributes:
        root: tensor-name prefix of the language model, e.g. ``model.language_model``.
        stack: prefix of its decoder layers, e.g. ``model.language_model.layers``.
        layers: how many decoder layers.
        choices: one entry for every source tensor.
        outside: the parts that are not the language model and hold linear weights, as prefixes of tensor names.
        kept_linears: modules with a 2-D weight that stay as they are, by their hub names, in file order.
        expert_layouts: by layer prefix, for fused experts.
        warnings: what a careful user should know.
        own_head: name of a head's weight that the config takes for the embedding, though its bytes are others; the
            result's config has to say otherwise. None where config and shards agree.
    """

    root: str
    stack: str
    layers: int
    choices: dict[str, Choice]
    outside: tuple[str, ...]
    kept_linears: tuple[str, ...]
    expert_layouts: dict[str, ExpertLayout]
    warnings: tuple[str, ...] = ()
    own_head: str | None = None


def select(checkpoint: Checkpoint, ignore: Iterable[str] = ()) -> Selection:
    """Find the language model and give every tensor its role.

    Args:
        checkpoint: headers and config.
        ignore: the recipe's patterns: a module's name (and all below it), a glob, or ``re:`` with a regular
            expression matched from the start of the module's name, as compressed-tensors does.

    Raises:
        SourceError: no language model is found, or more than one; a layer is incomplete; experts are fused in an
            unknown way.
        UsageError: an ignore pattern matches nothing, or splits what vLLM fuses.
    """
    config = checkpoint.config
    model_type = str(config.get("model_type", "?"))
    found = _find_language_model(checkpoint)
    heads = _heads(checkpoint, found)
    choices = {name: _choose(tensor, found, heads) for name, tensor in checkpoint.tensors.items()}
    _refuse_transposed(checkpoint, choices)
    layouts = _expert_layouts(checkpoint, choices, found, model_type)
    warnings = _check_layers(checkpoint, choices, found)
    own = next((name for name, what in heads.items() if what == "own"), None)
    if own is not None:
        warnings.append(
            f"config.json says tie_word_embeddings: true, but the bytes of {own} are not those of "
            f"{found.embedding.name}: the head is kept, and the result's config.json says false"
        )
    warnings += [
        f"{name}: kept in this plan; whether it is the embedding once more, as config.json says, is seen when its "
        "shard is here"
        for name, what in heads.items() if what == "unknown"
    ]  # fmt: skip
    modules = quantizable_modules(checkpoint, choices, layouts)
    ignored = ignored_modules(checkpoint, modules, list(ignore), _head_names(found.root))
    refuse_split_groups(modules, ignored)
    whole, gone = Counter(modules.values()), Counter(modules[module] for module in ignored)
    for name, count in gone.items():
        if count == whole[name]:
            choices[name] = replace(choices[name], role="ignored")
    if model_type not in TESTED_MODEL_TYPES:
        warnings.append(
            f"model_type {model_type} is not among the families whose selection is tested against transformers; "
            "read the plan's table before you trust it"
        )
    if config.get("auto_map"):
        warnings.append(
            "config.json names custom code (auto_map); it is copied but never run here (trust_remote_code is off); "
            "to serve the result vLLM needs --trust-remote-code"
        )
    outside = tuple(dict.fromkeys(
        choice.component for name, choice in choices.items()
        if choice.role == "outside" and is_linear_shaped(checkpoint.tensors[name])
    ))  # fmt: skip
    kept = _kept_linears(checkpoint, choices, modules)
    return Selection(found.root, found.stack, found.layers, choices, outside, kept, layouts, tuple(warnings), own)


def is_linear_shaped(tensor: Tensor) -> bool:
    """Whether this can be a linear layer's weight: 2-D and called so."""
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight")


# --- the stack ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LanguageModel:
    """Where it is and how large; numbers that the config leaves to a class's defaults come from the headers."""

    stack: str
    layers: int
    embedding: Tensor
    experts: int  # 0: no mixture
    moe_blocks: frozenset[str]
    text: Mapping[str, Any]

    @property
    def root(self) -> str:
        return self.stack.rpartition(".")[0]

    @property
    def hidden(self) -> int:
        return self.embedding.shape[1]


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _find_language_model(checkpoint: Checkpoint) -> _LanguageModel:
    """The numbered stack beside an embedding that fits what the config says.

    LLaVA-1.5's and Gemma 3's text_config on the hub leave out what their classes have as defaults: layers, width or
    vocabulary. What is not said does not count; between several that fit, the one with the most vocabulary is it.
    """
    config, text = checkpoint.config, text_config(checkpoint.config)

    def said(key: str) -> int | None:
        for part in (text, config):
            if type(part.get(key)) is int and part[key] > 0:
                return int(part[key])
        return None

    layers, hidden, vocabulary = said("num_hidden_layers"), said("hidden_size"), said("vocab_size")
    indices: dict[str, set[int]] = defaultdict(set)
    for name in checkpoint.tensors:
        if match := re.match(r"(.*?)\.?\b(\d+)\.", name):
            indices[match[1]].add(int(match[2]))
    found: list[tuple[str, int, Tensor]] = []
    short: list[tuple[str, int]] = []
    for prefix, seen in indices.items():
        embedding = _embedding_beside(checkpoint, prefix.rpartition(".")[0], hidden, vocabulary)
        if embedding is None:
            continue
        count = next(n for n in range(len(seen) + 1) if n not in seen)
        if count and (layers is None or count >= layers):
            found.append((prefix, layers or count, embedding))
        elif layers is not None:
            short.append((prefix, count))
    if len(found) > 1:
        most = max(embedding.shape[0] for _, _, embedding in found)
        found = [entry for entry in found if entry[2].shape[0] == most]
    if len(found) > 1:
        listed = ", ".join(sorted(prefix for prefix, _, _ in found))
        raise SourceError(f"{checkpoint.label}: more than one language model found ({listed})")
    if not found and short:
        prefix, count = short[0]
        raise SourceError(
            f"{checkpoint.label}: config.json says {layers} decoder layers, but {prefix} has no layer {count}; "
            "a shard is missing, or the config belongs to another model"
        )
    if not found:
        stacks = ", ".join(f"{prefix} ({len(seen)})" for prefix, seen in sorted(indices.items())) or "none"
        raise SourceError(
            f"{checkpoint.label}: no language model found: config.json says {layers or 'nothing of'} layers of width "
            f"{hidden or 'unsaid'} beside an embedding of {vocabulary or 'unsaid'} rows; numbered stacks in the "
            f"shards: {stacks}"
        )
    stack, count, embedding = found[0]
    blocks = frozenset(match[1] for name in checkpoint.tensors if (match := re.match(r"(.*?)\.experts\.", name)))
    experts = next((n for key in _EXPERT_COUNTS if (n := said(key))), 0)
    return _LanguageModel(stack, count, embedding, experts, blocks, text)


def _embedding_beside(checkpoint: Checkpoint, parent: str, hidden: int | None, vocabulary: int | None) -> Tensor | None:
    """The largest 2-D tensor right below `parent` that can be an embedding of this width and vocabulary."""
    prefix = f"{parent}." if parent else ""
    fitting = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
        and name.count(".") == prefix.count(".") + 1
        and is_linear_shaped(tensor)
        and not _is_head(name)
        and (hidden is None or tensor.shape[1] == hidden)
        and (tensor.shape[0] >= vocabulary if vocabulary is not None else tensor.shape[0] > tensor.shape[1])
    ]
    return max(fitting, key=lambda tensor: tensor.shape[0], default=None)


# --- roles -------------------------------------------------------------------------------------------


def _is_head(name: str) -> bool:
    return re.search(r"(^|\.)(lm_head|output|embed_out)\.weight$", name) is not None


def _heads(checkpoint: Checkpoint, found: _LanguageModel) -> dict[str, Literal["copy", "own", "unknown"]]:
    """Heads in the shards that the config takes for the embedding: a copy of it, one of its own, or not to be told yet.

    transformers compares them while loading and keeps a head that differs; so does vLLM since 0.32, older ones drop it.
    What only the language model's part of a config says is taken up by some classes alone: a copy is kept then.
    """
    ties = head_ties(checkpoint.config)
    made: dict[str, Literal["copy", "own", "unknown"]] = {}
    for name, tensor in checkpoint.tensors.items() if ties != "no" else ():
        parent = name.rpartition(".")[0].rpartition(".")[0]
        beside = parent == "" or f"{found.root}.".startswith(f"{parent}.")
        alike = tensor.shape == found.embedding.shape
        if not _is_head(name) or tensor is found.embedding or not (alike or beside):
            continue
        same = same_bytes(checkpoint, tensor, found.embedding)
        if same is None:
            made[name] = "unknown"
        elif same and ties == "model":
            made[name] = "copy"
        elif not same and beside:
            made[name] = "own"
    return made


def _head_names(root: str) -> set[str]:
    """Names that the head's module goes by, tied or not: transformers' own, vLLM's, and those beside `root`."""
    parts = root.split(".") if root else []
    return {"lm_head", "language_model.lm_head", *(".".join([*parts[:n], "lm_head"]) for n in range(1, len(parts)))}


def _choose(tensor: Tensor, found: _LanguageModel, heads: Mapping[str, str]) -> Choice:
    name, stack, root = tensor.name, found.stack, found.root
    inside = re.match(rf"{re.escape(stack)}\.(\d+)\.(.+)" if stack else r"(\d+)\.(.+)", name)
    if inside:
        layer = int(inside[1])
        if layer >= found.layers:  # multi-token prediction and the like, which the language model proper does not run
            return Choice("outside", None, f"{stack}.{layer}")
        return Choice(_layer_role(tensor, found), layer, stack)
    if tensor is found.embedding:
        return Choice("embedding", None, name.rpartition(".")[0])
    if _is_head(name):
        return Choice("tied head" if heads.get(name) == "copy" else "head", None, name.rpartition(".")[0])
    prefix = f"{root}." if root else ""
    if name.startswith(prefix) and name.count(".") <= prefix.count(".") + 1 and len(tensor.shape) <= 1:
        return Choice("norm", None, root)
    return Choice("outside", None, _component(name, root))


def _component(name: str, root: str) -> str:
    """The first part of `name` that is not on the way to the language model: ``model.visual``, ``vision_tower``."""
    parts, way = name.split("."), root.split(".") if root else []
    depth = 0
    while depth < len(way) and depth < len(parts) - 1 and parts[depth] == way[depth]:
        depth += 1
    return ".".join(parts[: depth + 1])


def _layer_role(tensor: Tensor, found: _LanguageModel) -> Role:
    name, shape = tensor.name, tensor.shape
    if len(shape) <= 1:
        return "norm"
    if len(shape) == 3 and re.search(r"\.experts\.(gate_up_proj|down_proj)$", name):
        return "experts"
    if len(shape) == 3 and (".experts" in name or shape[0] == found.experts):
        raise SourceError(
            f"{name}: experts fused as {list(shape)}, a layout that is not known here",
            remedy="save the model with one tensor an expert first",
        )
    if not is_linear_shaped(tensor) or 0 in shape:
        return "other"
    return "router" if _routes(name.removesuffix(".weight"), shape[0], found) else "linear"


def _routes(module: str, rows: int, found: _LanguageModel) -> bool:
    """Whether a module of an MoE block decides who is asked: gate, router, shared_expert_gate.

    It stands in a block that has experts, but in none of them, and has a row per expert, or a single one.
    """
    block = next((block for block in found.moe_blocks if module.startswith(f"{block}.")), None)
    if block is None:
        return False
    inner = module.removeprefix(f"{block}.").split(".")
    expert = inner[0] == "experts" or (inner[0].startswith("shared_expert") and len(inner) > 1)
    return not expert and (rows in (1, found.experts) if found.experts else len(inner) == 1)


def _refuse_transposed(checkpoint: Checkpoint, choices: dict[str, Choice]) -> None:
    """GPT-2's Conv1D keeps [in, out]: per-channel scales would be a scale an input. Its bias gives it away."""
    for name, choice in choices.items():
        bias = checkpoint.tensors.get(name.removesuffix(".weight") + ".bias")
        if choice.role == "linear" and bias is not None and bias.shape != checkpoint.tensors[name].shape[:1]:
            raise SourceError(
                f"{name}: its bias has {list(bias.shape)} values for {list(checkpoint.tensors[name].shape)}; weights "
                "stored as [in, out] are not supported"
            )


def _check_layers(checkpoint: Checkpoint, choices: dict[str, Choice], found: _LanguageModel) -> list[str]:
    """A layer that lacks weights which another layer has, and has none instead, is an incomplete download."""
    stack = found.stack
    kinds: dict[int, set[str]] = {layer: set() for layer in range(found.layers)}
    for name, choice in choices.items():
        if choice.layer is not None and choice.role in ("linear", "experts"):
            kinds[choice.layer].add(name.removeprefix(f"{stack}." if stack else "").split(".", 1)[1])
    if not any(kinds.values()):
        raise SourceError(f"{checkpoint.label}: no linear weights in {stack}; nothing to quantize")
    for full in {frozenset(kind) for kind in kinds.values()}:
        for layer, kind in kinds.items():
            if kind < full:
                lost = f"{stack}.{layer} has no {min(full - kind)}, as other layers have"
                if checkpoint.config.get("model_type") in TESTED_MODEL_TYPES:
                    raise SourceError(
                        f"{checkpoint.label}: {lost}", remedy="the checkpoint is incomplete, fetch it again"
                    )
                return [f"{lost}; is the checkpoint complete?"]
    return []


# --- fused experts -----------------------------------------------------------------------------------


def _expert_layouts(
    checkpoint: Checkpoint, choices: dict[str, Choice], found: _LanguageModel, model_type: str
) -> dict[str, ExpertLayout]:
    layouts: dict[str, ExpertLayout] = {}
    for name, choice in choices.items():
        if choice.role != "experts" or not name.endswith(".gate_up_proj"):
            continue
        block = name.removesuffix(".gate_up_proj")
        down = checkpoint.tensors.get(f"{block}.down_proj")
        if model_type not in FUSED_EXPERTS or down is None:
            raise SourceError(
                f"{name}: fused experts of model_type {model_type} are not known here (which half is the gate?)",
                remedy="save the model with one tensor an expert first",
            )
        hidden, wide = found.hidden, int(found.text.get("moe_intermediate_size") or 0)
        shapes = checkpoint.tensors[name].shape[1:], down.shape[1:]
        # Both tensors are asked: where one is square, the other is not.
        if shapes == ((2 * wide, hidden), (hidden, wide)):
            transposed = False
        elif shapes == ((hidden, 2 * wide), (wide, hidden)):
            transposed = True
        else:
            raise SourceError(
                f"{name}: shapes {list(shapes[0])} and {list(shapes[1])} fit neither layout of experts with "
                f"hidden_size {hidden} and moe_intermediate_size {wide}"
            )
        layouts[block] = ExpertLayout(down.shape[0], hidden, wide, transposed)
    for name, choice in choices.items():
        if choice.role == "experts" and name.rpartition(".")[0] not in layouts:
            raise SourceError(f"{name}: there is no gate_up_proj beside it; the checkpoint is incomplete")
    return layouts


def expert_modules(block: str, kind: str, layout: ExpertLayout) -> list[tuple[int, list[tuple[str, int, int]]]]:
    """The modules that a fused tensor becomes, expert by expert.

    Args:
        block: e.g. ``model.language_model.layers.0.mlp.experts``.
        kind: ``gate_up_proj`` or ``down_proj``.
        layout: of the layer.

    Returns:
        For each expert, its index and ``(module, rows, columns)`` in the order in which they lie.
    """
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    shape = (layout.intermediate, layout.hidden) if kind == "gate_up_proj" else (layout.hidden, layout.intermediate)
    return [(e, [(f"{block}.{e}.{name}", *shape) for name in names]) for e in range(layout.experts)]


def quantizable_modules(
    checkpoint: Checkpoint, choices: dict[str, Choice], layouts: dict[str, ExpertLayout]
) -> dict[str, str]:
    """Every module that will be quantized unless ignored, by its output name, with the source tensor it comes from."""
    modules: dict[str, str] = {}
    for name, choice in choices.items():
        if choice.role == "linear":
            modules[name.removesuffix(".weight")] = name
        elif choice.role == "experts":
            block, _, kind = name.rpartition(".")
            for _, parts in expert_modules(block, kind, layouts[block]):
                modules.update((module, name) for module, _, _ in parts)
    return modules


def attention_prefix(tensors: Iterable[str], layer: str) -> str | None:
    """The prefix of a layer's attention: the owner of its key projection, ``model.layers.3.self_attn``."""
    for name in tensors:
        found = re.match(rf"({re.escape(layer)}\.[^.]+)\.(k_proj|qkv_proj)\.weight$", name)
        if found:
            return found[1]
    return None


# --- ignore ------------------------------------------------------------------------------------------


def _kept_linears(checkpoint: Checkpoint, choices: dict[str, Choice], modules: dict[str, str]) -> tuple[str, ...]:
    kept: list[str] = []
    experts: dict[str, list[str]] = defaultdict(list)
    for module, owner in modules.items():
        if choices[owner].role == "ignored" and len(checkpoint.tensors[owner].shape) == 3:
            experts[owner].append(module)
    for name, choice in choices.items():
        kept += experts.get(name, [])
        if choice.role in ("ignored", "router", "head", "outside", "other") and is_linear_shaped(
            checkpoint.tensors[name]
        ):
            kept.append(name.removesuffix(".weight"))
    # the head's name in transformers and vLLM: where it is tied it is in no file, and LLaVA's files call it otherwise
    kept.append("lm_head")
    return tuple(dict.fromkeys(kept))


def expected_modules(name: str, tensor: Tensor, role: str, selection: Selection) -> Iterator[tuple[str, int, int]]:
    """The modules, with rows and columns, that a linear weight or a block of fused experts becomes."""
    if role == "linear":
        yield name.removesuffix(".weight"), tensor.shape[0], tensor.shape[1]
        return
    block, _, kind = name.rpartition(".")
    for _, modules in expert_modules(block, kind, selection.expert_layouts[block]):
        yield from modules


def outside_patterns(selection: Selection) -> list[str]:
    """Entries of a compressed-tensors ``ignore`` for the parts outside the language model.

    One regular expression for each part, unless it would also match inside: vLLM merges q/k/v of some vision towers and
    then finds no literal name of the merged module.
    """
    patterns = []
    inside = [
        name.removesuffix(".weight")
        for name, choice in selection.choices.items()
        if choice.role in ("linear", "experts")
    ]
    for component in selection.outside:
        last = component.rpartition(".")[2]
        if last.isdigit():
            continue
        pattern = rf"(?:.*\.)?{re.escape(last)}(?:\..*)?$"
        if not any(re.match(pattern, name) for name in inside):
            patterns.append(f"re:{pattern}")
    return list(dict.fromkeys(patterns))
