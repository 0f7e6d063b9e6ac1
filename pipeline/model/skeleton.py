"""A transformers model without weights, whose decoder layers are filled one at a time.

A *tensor name* is the hub's, a *module path* is transformers'. Both ways between them go through transformers' own
conversion mapping, and so does loading: renamed, stacked, fused and transposed weights arrive as `from_pretrained`
makes them. tests/test_skeleton.py holds that equal for every family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.source import Checkpoint, SourceError
from pipeline.library_messages import quiet
from pipeline.model.batch import Batch
from pipeline.model.selection import Selection, attention_prefix, expert_modules


@dataclass(frozen=True)
class Experts:
    """A module that holds all experts of a layer in two 3-D parameters, [experts, out, in].

    Attributes:
        path: of the module, within its layer.
        module: with ``gate_up_proj`` (gate above up) and ``down_proj``.
        names: for each expert, the output modules' names of gate, up and down.
    """

    path: str
    module: Any
    names: list[tuple[str, str, str]]


@dataclass
class Layer:
    """A decoder layer whose weights are loaded.

    Attributes:
        index: from 0.
        prefix: tensor-name prefix, e.g. ``model.layers.3``.
        module: transformers' module, weights in BF16 on the device.
        linears: by output module name, the linear layers that are to be quantized.
        experts: fused experts that are to be quantized.
        attention: prefix of the attention's tensor names, e.g. ``model.layers.3.self_attn``; None where the layer
            has no attention with keys and values.
        attention_module: its module.
        device: where the weights are.
        tensors: the layer's tensors as they were read, by tensor name; BF16 weights on a CPU are these very values.
    """

    index: int
    prefix: str
    module: Any
    linears: dict[str, Any]
    experts: list[Experts]
    attention: str | None
    attention_module: Any
    device: Any
    tensors: Mapping[str, Any]


def model_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The class that a checkpoint's config.json names, and its config, as calibration runs them.

    Raises:
        SourceError: config.json names none, or one that transformers does not have, or does not fit it.
    """
    import transformers

    named = checkpoint.config.get("architectures")
    name = named[0] if isinstance(named, list) and named else named
    if not isinstance(name, str) or not name:
        likely = _class_of(str(checkpoint.config.get("model_type")))
        raise SourceError(
            f"{checkpoint.label}: config.json names no class in architectures, and calibration runs the model's own",
            remedy=f'add "architectures": ["{likely}"]'
            if likely
            else "add its architectures, as the original has them",
        )
    known = getattr(transformers, name, None)
    if known is None:
        raise SourceError(
            f"{checkpoint.label}: transformers {transformers.__version__} has no class {name!r}, which config.json "
            "names in architectures; only models that transformers runs can be calibrated"
        )
    with quiet(), _building(checkpoint):
        config = transformers.AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=False)
        _forget_kernels(config)
    return known, config


def _class_of(model_type: str) -> str | None:
    """The class that transformers has for a type of model that writes text."""
    from transformers.models.auto import modeling_auto as auto

    for table in (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if name := table.get(model_type):
            return name if isinstance(name, str) else None
    return None


def _forget_kernels(config: Any) -> None:
    """Attention as transformers chooses it, where a config asks for a kernel that needs a further library.

    What fine-tunes leave there, such as flash_attention_2, is how they were trained, and nothing of the model.
    """
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        config._attn_implementation_internal = None
    if getattr(config, "_experts_implementation", None) not in (None, "eager", "grouped_mm", "batched_mm"):
        config._experts_implementation_internal = None
    for key in getattr(config, "sub_configs", ()):
        if (part := getattr(config, key, None)) is not None:
            _forget_kernels(part)


@contextmanager
def _building(checkpoint: Checkpoint) -> Iterator[None]:
    """Whatever transformers raises over a config that does not fit, as one line."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise SourceError(f"{checkpoint.label}: transformers cannot build this model: {text}") from None


class Skeleton:
    """See the module's text."""

    def __init__(self, model: Any, checkpoint: Checkpoint, selection: Selection, device: Any) -> None:
        self.model = model
        self.device = device
        self._checkpoint = checkpoint
        self._selection = selection
        self._names = _Names(model)
        self.stack, self.layers = self._find_layers()

    @classmethod
    def build(cls, checkpoint: Checkpoint, selection: Selection, device: Any) -> Skeleton:
        """The checkpoint's class on the meta device; buffers, such as rotary frequencies, are real and on `device`.

        Raises:
            SourceError: transformers does not know the class, or not as the config says.
        """
        import torch
        import transformers
        from accelerate import init_empty_weights

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        known, config = model_class(checkpoint)
        with quiet(), _building(checkpoint), init_empty_weights(include_buffers=False):
            model = known._from_config(config, dtype=torch.bfloat16)
        model.eval()
        for module in model.modules():
            for key, value in list(module._buffers.items()):
                if value is not None and not value.is_meta:
                    module._buffers[key] = value.to(device)
        return cls(model, checkpoint, selection, device)

    # --- names ---

    def path_of(self, tensor: str) -> str:
        """The parameter's path that a tensor of the checkpoint goes into."""
        return self._names.path_of(tensor)

    def conversions(self) -> Any:
        """transformers' conversion mapping for this model, made anew: loading changes it."""
        return self._names.mapping()

    def module_paths(self) -> dict[str, str]:
        """For every weight of the language model that is quantized, its tensor name and its module's path."""
        found = {}
        for name, choice in self._selection.choices.items():
            if choice.role in ("linear", "experts"):
                found[name] = self.path_of(name).rpartition(".")[0]
        return found

    def _find_layers(self) -> tuple[str, Any]:
        import torch

        selection = self._selection
        first = next(n for n, c in selection.choices.items() if c.layer == 0 and n.endswith(".weight"))
        path = self.path_of(first)
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.ModuleList) and path.startswith(f"{name}.0."):
                if len(module) != selection.layers:
                    break
                return name, module
        raise SourceError(
            f"{self._checkpoint.label}: {first} is {path} in transformers, where no list of {selection.layers} layers "
            "was found; the config and the class do not fit"
        )

    # --- layers ---

    def load_layer(self, index: int, tensors: Mapping[str, Any]) -> Layer:
        """Fill a decoder layer.

        Args:
            index: which.
            tensors: every tensor of the layer by its name in the checkpoint, on the CPU, as it was read.

        Raises:
            SourceError: transformers finds a tensor missing, left over, or of another shape.
        """
        module, path = self.layers[index], f"{self.stack}.{index}"
        self._fill(tensors)
        empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if empty:
            raise SourceError(f"{self._checkpoint.label}: nothing in the shards becomes {path}.{empty[0]}")
        linears, experts = self._quantized_modules(index, tensors)
        prefix = f"{self._selection.stack}.{index}" if self._selection.stack else str(index)
        attention = attention_prefix(tensors, prefix)
        attention_module = None
        if attention is not None:
            key = next(n for n in tensors if n in (f"{attention}.k_proj.weight", f"{attention}.qkv_proj.weight"))
            attention_module = self.model.get_submodule(self.path_of(key).rsplit(".", 2)[0])
        return Layer(index, prefix, module, linears, experts, attention, attention_module, self.device, tensors)

    def drop_layer(self, index: int) -> None:
        """Release a layer's weights; it is never run again."""
        import torch

        layer = self.layers[index]
        for parameter in layer.parameters():
            parameter.data = torch.empty(0)  # observers refer to each other in circles, and the GPU cannot wait for gc
        self.layers[index] = torch.nn.Identity()

    def _fill(self, tensors: Mapping[str, Any]) -> None:
        import torch
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        wanted = LoadStateDictConfig(
            device_map={"": self.device}, dtype=torch.bfloat16, weight_mapping=self._names.mapping()
        )
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(tensors), wanted, None)
        wrong = [str(error).splitlines()[0] for error in info.conversion_errors.values()]
        wrong += [
            f"{name}: {list(found)} instead of {list(expected)}" for name, found, expected in info.mismatched_keys
        ]
        # what the class does not know, such as the inv_freq of old checkpoints, it does without, as from_pretrained
        needed = {self.path_of(n) for n in tensors if self._selection.choices[n].role in ("linear", "experts")}
        wrong += [f"{name}: the model has no such parameter" for name in info.unexpected_keys if name in needed]
        if wrong:
            raise SourceError(f"{self._checkpoint.label}: transformers cannot load {wrong[0]}")

    def _quantized_modules(self, index: int, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], list[Experts]]:
        linears: dict[str, Any] = {}
        fused: dict[str, dict[int, list[str]]] = {}
        for name in tensors:
            role = self._selection.choices[name].role
            path = self.path_of(name)
            if role == "linear":
                owner = path.rpartition(".")[0]
                module = self.model.get_submodule(owner)
                if path.endswith(".weight"):
                    linears[name.removesuffix(".weight")] = module
                    continue
                expert, part = self._names.place_of(name)
                fused.setdefault(owner, {}).setdefault(expert, ["", "", ""])[part] = name.removesuffix(".weight")
            elif role == "experts":
                owner = path.rpartition(".")[0]
                block, _, kind = name.rpartition(".")
                for expert, modules in expert_modules(block, kind, self._selection.expert_layouts[block]):
                    parts = fused.setdefault(owner, {}).setdefault(expert, ["", "", ""])
                    for (module_name, _, _), part in zip(
                        modules, (0, 1) if kind == "gate_up_proj" else (2,), strict=True
                    ):
                        parts[part] = module_name
        experts = []
        for owner, found in fused.items():
            names = [(found[e][0], found[e][1], found[e][2]) for e in sorted(found)]
            relative = owner.removeprefix(f"{self.stack}.{index}.")
            experts.append(Experts(relative, self.model.get_submodule(owner), names))
        return linears, experts

    # --- what the layers are called with ---

    def first_inputs(
        self, batches: Iterable[Batch], rows: Callable[[list[int]], Any]
    ) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """What reaches the first layer, and what every layer is called with, batch by batch.

        The model runs as transformers runs it, with layers that hand on what they get: positions, masks and the
        scaling of embeddings are its own.

        Args:
            batches: token batches.
            rows: gives the embedding's rows for sorted, distinct token ids, [ids, hidden] in BF16 on the device.

        Yields:
            Hidden states [rows, length, hidden], and for each layer the keyword arguments beside them.
        """
        import torch

        model, embedding = self.model, self._embedding()
        seen: list[tuple[Any, dict[str, Any]]] = []

        class Reached(Exception):
            pass

        def stand_in(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise SourceError(
                    f"{type(model).__name__}: it calls its layers in an unknown way", remedy="please report it"
                )
            seen.append((hidden_states, kwargs))
            if len(seen) == len(self.layers):
                raise Reached
            return hidden_states

        kept, padding = embedding.weight, getattr(embedding, "padding_idx", None)
        embedding.padding_idx = None  # means gradients alone, and is checked against the rows that are here
        for layer in self.layers:
            layer.__dict__["forward"] = stand_in
        try:
            for batch in batches:
                ids = torch.tensor(batch.ids, dtype=torch.long).view(batch.rows, batch.length)
                distinct, places = torch.unique(ids, sorted=True, return_inverse=True)
                table, places = rows(distinct.tolist()), places.to(self.device)
                embedding.weight = torch.nn.Parameter(table, requires_grad=False)
                hook = embedding.register_forward_pre_hook(lambda _module, _args, places=places: (places,))
                seen.clear()
                try:
                    with torch.no_grad():
                        model(input_ids=ids.to(self.device), use_cache=False)
                except Reached:
                    pass
                finally:
                    hook.remove()
                yield seen[0][0], [kwargs for _, kwargs in seen]
        finally:
            embedding.weight, embedding.padding_idx = kept, padding
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def _embedding(self) -> Any:
        return self.model.get_submodule(self.path_of(self.embedding_tensor).rpartition(".")[0])

    @property
    def embedding_tensor(self) -> str:
        """The name of the embedding's tensor."""
        return next(name for name, choice in self._selection.choices.items() if choice.role == "embedding")


class _Names:
    """Tensor names to parameter paths, through transformers' conversion mapping."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self.mapping: Callable[[], Any] = lambda: get_model_conversion_mapping(model)
        transforms = self.mapping()
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._meta = dict.fromkeys([name for name, _ in model.named_parameters()], True)
        self._meta.update(dict.fromkeys([name for name, _ in model.named_buffers()], True))
        self._known: dict[str, tuple[str, str | None]] = {}

    def path_of(self, tensor: str) -> str:
        return self._renamed(tensor)[0]

    def place_of(self, tensor: str) -> tuple[int, int]:
        """Of a tensor that is stacked into fused experts: which expert, and 0 for gate, 1 for up, 2 for down."""
        path, pattern = self._renamed(tensor)
        assert pattern is not None, "only a converter stacks experts"
        owner = next(c for c in self._converters if pattern in c.source_patterns)
        expert = int(re.findall(r"\.(\d+)\.", tensor)[-1])
        return expert, 2 if path.endswith("down_proj") else owner.source_patterns.index(pattern)

    def _renamed(self, tensor: str) -> tuple[str, str | None]:
        """Layers and experts are renamed alike: one of each is looked up, the numbers put back in."""
        from transformers.core_model_loading import rename_source_key

        numbers = re.findall(r"(?<=\.)\d+(?=\.)", tensor)
        shape = re.sub(r"(?<=\.)\d+(?=\.)", "0", tensor)
        if shape not in self._known:
            prefix = self._model.base_model_prefix
            found = rename_source_key(shape, self._renamings, self._converters, prefix, self._meta)
            if found[0] not in self._meta and shape in self._meta:
                found = (shape, None)
            self._known[shape] = found
        path, pattern = self._known[shape]
        order = iter(numbers)
        return re.sub(r"(?<=\.)0(?=\.)", lambda _: next(order), path), pattern
