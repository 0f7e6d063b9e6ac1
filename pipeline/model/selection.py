"""What is the language model and what is not, found from the config and the shards' headers.

No list of model names decides: the language model is the stack of decoder layers whose number the
config's text part gives, standing beside an embedding of vocabulary size. Its 2-D weights are quantized,
except routers and gates; everything else stays as it is. tests/test_selection.py holds this equal to
what the transformers classes say, family by family.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from pipeline.checkpoint.source import Checkpoint, SourceError, Tensor
from pipeline.errors import UsageError

# Families whose selection the tests compare with transformers. Others work by the same rules, with a warning.
TESTED_MODEL_TYPES = frozenset({
    "gemma3", "gemma3_text", "internvl", "llama", "llava", "mistral", "mistral3", "mixtral", "phi3", "qwen2",
    "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe",
})  # fmt: skip

# 3-D expert tensors say nothing of what lies where inside; only models whose modeling code was read are listed.
# gate first, up second along the fused dimension; both layouts, [experts, in, out] on the hub and [experts, out, in]
# as transformers 5 saves, are told apart by their shapes.
FUSED_EXPERTS = frozenset({"qwen3_vl_moe"})

# What vLLM merges into one GEMM with one quantization scheme (packed_modules_mapping of its models).
FUSED_LINEARS = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)

Role = Literal["linear", "experts", "ignored", "router", "norm", "embedding", "head", "outside", "other"]

REASONS: dict[Role, str] = {
    "linear": "linear layer of the language model",
    "experts": "fused experts of the language model",
    "ignored": "the recipe's ignore",
    "router": "router or gate: it chooses experts, its errors cost most",
    "norm": "norm or bias",
    "embedding": "embedding",
    "head": "output head",
    "outside": "outside the language model",
    "other": "in the language model, but no linear weight",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What one source tensor is.

    Attributes:
        role: decides its fate; `REASONS` says why.
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
        outside: tensor-name prefixes of the parts that are not the language model.
        kept_linears: modules with a 2-D weight that stay as they are, by their hub names, in file order.
        expert_layouts: by layer prefix, for fused experts.
        ignored_experts: output modules of fused experts that the recipe ignores.
    """

    root: str
    stack: str
    layers: int
    choices: dict[str, Choice]
    outside: tuple[str, ...]
    kept_linears: tuple[str, ...]
    expert_layouts: dict[str, ExpertLayout]
    warnings: tuple[str, ...] = field(default=())


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model (older Qwen2.5-VL configs have no such part)."""
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, dict) and ("num_hidden_layers" in part or "hidden_size" in part):
            return part
    thinker = config.get("thinker_config")
    return text_config(thinker) if isinstance(thinker, dict) else config


def head_is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: said somewhere, and denied nowhere."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(said) and all(said)


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
    config, text = checkpoint.config, text_config(checkpoint.config)
    model_type = str(config.get("model_type", "?"))
    stack, layers = _find_stack(checkpoint, text)
    root = stack.rpartition(".")[0]
    moe_blocks = {match[1] for name in checkpoint.tensors if (match := re.match(r"(.*?)\.experts\.", name))}
    vocabulary = int(text.get("vocab_size", config.get("vocab_size", 0)))
    hidden = int(text.get("hidden_size", 0))
    choices: dict[str, Choice] = {}
    for name, tensor in checkpoint.tensors.items():
        choices[name] = _choose(name, tensor, stack, root, layers, moe_blocks, text, vocabulary, hidden)
    warnings = _check_layers(checkpoint, choices, stack, layers)
    layouts = _expert_layouts(checkpoint, choices, text, model_type)
    modules = quantizable_modules(checkpoint, choices, layouts)
    ignored = _apply_ignore(checkpoint, modules, list(ignore))
    _refuse_split_groups(modules, ignored)
    fused_ignored: dict[str, set[str]] = defaultdict(set)
    for module in ignored:
        fused_ignored[modules[module]].add(module)
    for tensor_name, gone in fused_ignored.items():
        whole = {module for module, owner in modules.items() if owner == tensor_name}
        if gone == whole:
            choices[tensor_name] = Choice("ignored", choices[tensor_name].layer, choices[tensor_name].component)
    outside = tuple(dict.fromkeys(c.component for c in choices.values() if c.role in ("outside", "head")))
    if model_type not in TESTED_MODEL_TYPES:
        warnings.append(
            f"model_type {model_type} is not among the families whose selection is tested against transformers; "
            "read the plan's table before you trust it"
        )
    if config.get("auto_map"):
        warnings.append(
            "config.json names custom code (auto_map); it is carried but never run here (trust_remote_code is off); "
            "to serve the result vLLM needs --trust-remote-code"
        )
    kept = _kept_linears(checkpoint, choices, modules)
    return Selection(root, stack, layers, choices, outside, kept, layouts, tuple(warnings))


# --- the stack ---------------------------------------------------------------------------------------


def _find_stack(checkpoint: Checkpoint, text: Mapping[str, Any]) -> tuple[str, int]:
    layers = text.get("num_hidden_layers", text.get("n_layer", text.get("num_layers")))
    hidden = text.get("hidden_size", text.get("n_embd"))
    vocabulary = text.get("vocab_size", checkpoint.config.get("vocab_size"))
    if not all(type(value) is int and value > 0 for value in (layers, hidden, vocabulary)):
        raise SourceError(
            f"{checkpoint.root / 'config.json'}: num_hidden_layers, hidden_size and vocab_size of a language model "
            "are needed to find it; is this a language or vision-language model?"
        )
    indices: dict[str, set[int]] = defaultdict(set)
    for name in checkpoint.tensors:
        if match := re.match(r"(.*?)\.?\b(\d+)\.", name):
            indices[match[1]].add(int(match[2]))
    found, near = [], []
    for prefix, seen in indices.items():
        parent = prefix.rpartition(".")[0]
        if not seen >= set(range(layers)):
            if _has_embedding(checkpoint, parent, hidden, vocabulary):
                near.append((prefix, seen))
            continue
        if _has_embedding(checkpoint, parent, hidden, vocabulary):
            found.append(prefix)
    if len(found) == 1:
        return found[0], layers
    if found:
        raise SourceError(f"{checkpoint.label}: more than one language model found ({', '.join(sorted(found))})")
    for prefix, seen in near:
        lost = sorted(set(range(layers)) - seen)
        raise SourceError(
            f"{checkpoint.label}: config.json says {layers} decoder layers, but {prefix} has no layer {lost[0]}; "
            "a shard is missing, or the config belongs to another model"
        )
    listed = ", ".join(f"{prefix} ({len(seen)})" for prefix, seen in sorted(indices.items())) or "none"
    raise SourceError(
        f"{checkpoint.label}: no language model found: config.json says {layers} layers of width {hidden} beside an "
        f"embedding of {vocabulary} rows; numbered stacks in the shards: {listed}"
    )


def _has_embedding(checkpoint: Checkpoint, parent: str, hidden: int, vocabulary: int) -> bool:
    prefix = f"{parent}." if parent else ""
    return any(
        name.startswith(prefix) and name.count(".") == prefix.count(".") + 1 and _is_vocabulary(t, hidden, vocabulary)
        for name, t in checkpoint.tensors.items()
        if len(t.shape) == 2
    )


def _is_vocabulary(tensor: Tensor, hidden: int, vocabulary: int) -> bool:
    return len(tensor.shape) == 2 and tensor.shape[0] >= vocabulary and tensor.shape[1] == hidden


# --- roles -------------------------------------------------------------------------------------------


def _choose(
    name: str,
    tensor: Tensor,
    stack: str,
    root: str,
    layers: int,
    moe_blocks: set[str],
    text: Mapping[str, Any],
    vocabulary: int,
    hidden: int,
) -> Choice:
    inside = re.match(rf"{re.escape(stack)}\.(\d+)\.(.+)" if stack else r"(\d+)\.(.+)", name)
    if inside:
        layer = int(inside[1])
        if layer >= layers:  # multi-token prediction and the like, which the language model proper does not run
            return Choice("outside", None, f"{stack}.{layer}")
        return Choice(_layer_role(name, tensor, moe_blocks, text), layer, stack)
    prefix = f"{root}." if root else ""
    if name.startswith(prefix) and name.removeprefix(prefix).count(".") <= 1:
        if _is_vocabulary(tensor, hidden, vocabulary):
            head = "lm_head" in name or "output" in name.rsplit(".", 2)[-2]
            return Choice("head" if head else "embedding", None, name.rpartition(".")[0])
        if len(tensor.shape) <= 1:
            return Choice("norm", None, root)
    component = _component(name, root)
    if _is_vocabulary(tensor, hidden, vocabulary) or re.search(r"(^|\.)lm_head\.", name):
        return Choice("head", None, name.rpartition(".")[0])
    return Choice("outside", None, component)


def _component(name: str, root: str) -> str:
    """The first part of `name` that is not on the way to the language model: ``model.visual``, ``vision_tower``."""
    parts, way = name.split("."), root.split(".") if root else []
    depth = 0
    while depth < len(way) and depth < len(parts) - 1 and parts[depth] == way[depth]:
        depth += 1
    return ".".join(parts[: depth + 1])


def _layer_role(name: str, tensor: Tensor, moe_blocks: set[str], text: Mapping[str, Any]) -> Role:
    if len(tensor.shape) <= 1:
        return "norm"
    if len(tensor.shape) == 3 and re.search(r"\.experts\.(gate_up_proj|down_proj)$", name):
        return "experts"
    if len(tensor.shape) == 3 and ".experts" in name:
        raise SourceError(
            f"{name}: experts fused as {list(tensor.shape)}, a layout that is not known here; "
            "save the model with one tensor an expert first"
        )
    if len(tensor.shape) != 2 or not name.endswith(".weight"):
        return "other"
    module = name.removesuffix(".weight")
    parent, _, last = module.rpartition(".")
    experts = next((text[key] for key in _EXPERT_COUNTS if type(text.get(key)) is int), 0)
    routes = (tensor.shape[0] == experts and last in ("gate", "router")) or ".router." in f"{module}."
    # an MoE block's own weights, beside its experts, decide who is asked: gate, router, shared_expert_gate
    return "router" if parent in moe_blocks or (experts and routes) else "linear"


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _check_layers(checkpoint: Checkpoint, choices: dict[str, Choice], stack: str, layers: int) -> list[str]:
    """A layer that lacks weights which another layer has, and has none instead, is an incomplete download."""
    kinds: dict[int, set[str]] = {layer: set() for layer in range(layers)}
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
                    raise SourceError(f"{checkpoint.label}: {lost}; the checkpoint is incomplete, fetch it again")
                return [f"{lost}; is the checkpoint complete?"]
    return []


# --- fused experts -----------------------------------------------------------------------------------


def _expert_layouts(
    checkpoint: Checkpoint, choices: dict[str, Choice], text: Mapping[str, Any], model_type: str
) -> dict[str, ExpertLayout]:
    layouts: dict[str, ExpertLayout] = {}
    for name, choice in choices.items():
        if choice.role != "experts" or not name.endswith(".gate_up_proj"):
            continue
        block = name.removesuffix(".gate_up_proj")
        down = checkpoint.tensors.get(f"{block}.down_proj")
        if model_type not in FUSED_EXPERTS or down is None:
            raise SourceError(
                f"{name}: fused experts of model_type {model_type} are not known here (which half is the gate?); "
                "save the model with one tensor an expert first"
            )
        hidden, wide = int(text["hidden_size"]), int(text["moe_intermediate_size"])
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


# --- ignore ------------------------------------------------------------------------------------------


def matches(pattern: str, module: str) -> bool:
    """Whether an ignore pattern means this module (see `select`)."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or fnmatchcase(module, pattern)


def _apply_ignore(checkpoint: Checkpoint, modules: dict[str, str], patterns: list[str]) -> list[str]:
    everything = set(modules) | {name.rpartition(".")[0] for name in checkpoint.tensors}
    for pattern in patterns:
        if not any(matches(pattern, module) for module in everything):
            example = next(iter(modules))
            raise UsageError(
                f"ignore: {pattern!r} matches no module of {checkpoint.label}; names are the checkpoint's own, e.g. "
                f"{example}; globs (*.down_proj) and re: with a regular expression work too"
            )
    return [module for module in modules if any(matches(pattern, module) for pattern in patterns)]


def _refuse_split_groups(modules: dict[str, str], ignored: list[str]) -> None:
    gone = set(ignored)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        parent, _, last = module.rpartition(".")
        if expert := re.match(r"(.*\.experts)\.\d+$", parent):
            groups[(expert[1], "its experts, one fused kernel")].append(module)
            continue
        for fused, parts in FUSED_LINEARS:
            if last in parts:
                groups[(parent, fused)].append(module)
    for (parent, fused), members in groups.items():
        out = [member for member in members if member in gone]
        if out and len(out) < len(members):
            kept = [member for member in members if member not in gone]
            raise UsageError(
                f"ignore: {_names(out)} of {parent} would stay BF16 while {_names(kept)} become FP8, but vLLM fuses "
                f"them ({fused}); ignore all of them or none"
            )


def _names(modules: list[str]) -> str:
    parts = [module.split(".")[-1] for module in modules]
    if (len(set(parts)) == 1 and len(parts) > 1) or len(parts) > 6:
        return f"{len(parts)} modules ({modules[0]}, ...)"
    return ", ".join(parts)


def _kept_linears(checkpoint: Checkpoint, choices: dict[str, Choice], modules: dict[str, str]) -> tuple[str, ...]:
    kept: list[str] = []
    for name, choice in choices.items():
        tensor = checkpoint.tensors[name]
        if choice.role == "ignored" and len(tensor.shape) == 3:
            kept += [module for module, owner in modules.items() if owner == name]
        elif choice.role in ("ignored", "router", "head", "outside", "other") and (
            len(tensor.shape) == 2 and name.endswith(".weight")
        ):
            kept.append(name.removesuffix(".weight"))
    # the head's name in transformers and vLLM: where it is tied it is in no file, and LLaVA's files call it otherwise
    kept.append("lm_head")
    return tuple(dict.fromkeys(kept))
