"""ModelOpt's FP8: static W8A8 with per-tensor scales, calibrated; KV scales by its bmm quantizers.

Exact mode gives the bits, names and configs of ``mtq.quantize`` and ``export_hf_checkpoint`` of ModelOpt 0.47.0
(tests/test_equal_modelopt.py compares them). The default is made for serving with the same quantizers and the same
cast: what vLLM fuses into one GEMM shares one ``weight_scale``, so that it is never rounded a second time; parts
that differ much in size are first equalized by exact powers of two; weight scales are BF16 numbers, rounded up, so
that the FP8 values are the same on every device; KV scales are BF16 and come with q and prob.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.backends.attention import scale_tensors
from pipeline.backends.base import CalibrationError, Observed
from pipeline.backends.fp8 import NonFiniteWeight
from pipeline.formats.base import Output, Requantized
from pipeline.formats.kv_scales import E4M3_MAX, MODELOPT_NAMES, MODELOPT_OWN_NAMES, bf16_up, usable
from pipeline.formats.methods import MODELOPT
from pipeline.library_messages import quiet
from pipeline.model.fused import fused_groups
from pipeline.model.selection import Selection

if TYPE_CHECKING:
    from pipeline.checkpoint.source import Checkpoint
    from pipeline.model.skeleton import Experts, Layer, Skeleton

# Below this ratio of largest magnitudes E4M3's four exponent bits take the difference; above, small weights of the
# smaller part fall among its subnormal numbers (tests/test_equalization.py measures it).
BALANCE_FROM = 16.0


class ModelOptFP8:
    """Backend ``modelopt``, scheme ``fp8``.

    Args:
        kv_cache: whether keys and values get scales.
        exact: ModelOpt's own bits, names and configs.
        balance: scale parts that differ in size by powers of two; never in exact mode.
    """

    name = "modelopt"
    format = MODELOPT
    needs_data = True
    weights_need_data = True
    tags: tuple[str, ...] = ("modelopt",)
    expert_rule = (
        "all experts of a layer share the amax of their input, and each expert's weights give their own, so none is "
        "without a scale"
    )
    import_seconds = 5.0
    forward_cost = 1.0

    def __init__(self, kv_cache: bool, exact: bool = False, balance: bool = True) -> None:
        self.kv_cache = kv_cache
        self.exact = exact
        self.balance = balance and not exact

    @property
    def card(self) -> str:
        """For the model card."""
        more = (
            ", bit for bit as ModelOpt itself exports them"
            if self.exact
            else "; fused modules (q/k/v, gate/up) share one weight scale"
        )
        return (
            "Weights and inputs of the language model's linear layers are quantized per-tensor with static scales\n"
            f"(ModelOpt's FP8, W8A8){more}.\n"
            "Everything else is byte for byte the source's, but for biases where the notes below say that modules\n"
            "were equalized."
        )

    def attention_outputs(self) -> tuple[Output, ...]:
        """KV scales: ModelOpt's own names and F32 in exact mode, else those that every vLLM seen loads, in BF16."""
        if not self.kv_cache:
            return ()
        return (MODELOPT_OWN_NAMES if self.exact else MODELOPT_NAMES).outputs()

    def imports_torch(self, dtypes: set[str]) -> bool:
        """Always."""
        return True

    def load_libraries(self) -> None:
        """ModelOpt, which prints about itself while it is imported."""

        with quiet():
            import modelopt.torch.export
            import modelopt.torch.quantization  # noqa: F401

    def versions(self, dtypes: set[str]) -> dict[str, str]:
        """ModelOpt and torch make the FP8 values, transformers the activations."""
        return {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")}

    # --- config ---

    def config_section(self, selection: Selection) -> dict[str, Any]:
        """As ModelOpt 0.47.0 writes it into config.json, with every module that is kept named in ``ignore``.

        A part outside the language model is named as a whole besides: vLLM renames and fuses modules there, and
        takes ``*`` patterns for this method.
        """
        numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
        section: dict[str, Any] = {
            "config_groups": {"group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}},
            "ignore": ignore_entries(selection),
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": version("nvidia-modelopt")},
            "quant_method": "modelopt",
        }
        if self.kv_cache:
            section["kv_cache_scheme"] = dict(numbers)
        return section

    def extra_files(self, checkpoint: Checkpoint, selection: Selection) -> dict[str, Any]:
        """``hf_quant_config.json``, the section in an older form; in exact mode both files are ModelOpt's own."""
        if self.exact:
            return self._exact_files(checkpoint, selection)
        return {
            "hf_quant_config.json": {
                "producer": {"name": "modelopt", "version": version("nvidia-modelopt")},
                "quantization": {
                    "quant_algo": "FP8",
                    "kv_cache_quant_algo": "FP8" if self.kv_cache else None,
                    "exclude_modules": ignore_entries(selection),
                },
            }
        }

    def _exact_files(self, checkpoint: Checkpoint, selection: Selection) -> dict[str, Any]:
        import contextlib
        import json
        import tempfile
        from pathlib import Path

        import torch
        from modelopt.torch.export.quant_aware_conversion import (
            QuantConversionUnsupportedError,
            build_reverse_name_mapper,
            revert_quant_config_names,
        )
        from modelopt.torch.export.quant_utils import get_quant_config
        from modelopt.torch.export.unified_export_hf import _add_mtp_exclusions, _write_hf_export_config

        from pipeline.model.skeleton import Skeleton

        skeleton = Skeleton.build(checkpoint, selection, torch.device("cpu"))
        self.prepare(skeleton, selection)
        with quiet(), tempfile.TemporaryDirectory() as directory:
            found = get_quant_config(skeleton.model)
            with contextlib.suppress(QuantConversionUnsupportedError):  # then ModelOpt keeps transformers' names, too
                mapper = build_reverse_name_mapper(skeleton.model)
                if mapper is not None:
                    revert_quant_config_names(found["quantization"], mapper)
            # transformers leaves these weights out, so that ModelOpt's export does not know of them
            skeleton.model._mtp_layer_prefixes = _unknown_parts(skeleton, selection)
            _add_mtp_exclusions(skeleton.model, found)
            skeleton.model.config.save_pretrained(directory)
            _write_hf_export_config(skeleton.model, found, directory)
            names = ("config.json", "hf_quant_config.json")
            return {name: json.loads((Path(directory) / name).read_text()) for name in names}

    # --- calibration ---

    def prepare(self, skeleton: Skeleton, selection: Selection) -> None:
        """ModelOpt's quantizers on the whole model: a bare layer would get none for keys and values."""
        import modelopt.torch.quantization as mtq

        with quiet():
            mtq.quantize(skeleton.model, self.rules())
        chosen = set(skeleton.module_paths().values())
        for path, module in skeleton.model.named_modules():
            inside = path.startswith(f"{skeleton.stack}.")
            for name, child in module.named_children():
                if not re.search(r"(weight|input)_quantizers?$", name):
                    if not inside and name.endswith("_bmm_quantizer"):
                        child.disable()
                    continue
                if path not in chosen:
                    for quantizer in child if hasattr(child, "__iter__") else [child]:
                        quantizer.disable()
        self._refuse_unquantized(skeleton, selection)

    def rules(self) -> dict[str, Any]:
        """ModelOpt's FP8 rules without calibration; the KV rule stands before those that switch the vision off."""
        import copy

        import modelopt.torch.quantization as mtq

        rules = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
        rules["algorithm"] = None
        if self.kv_cache:
            cache = [copy.deepcopy(r) for r in mtq.FP8_KV_CFG["quant_cfg"] if "bmm" in r["quantizer_name"]]
            if not self.exact:  # queries as well
                cache += [{**copy.deepcopy(cache[0]), "quantizer_name": "*q_bmm_quantizer"}]
            rules["quant_cfg"] = rules["quant_cfg"][:3] + cache + rules["quant_cfg"][3:]
        return dict(rules)

    def _refuse_unquantized(self, skeleton: Skeleton, selection: Selection) -> None:
        """Every weight that the plan promises in FP8 must have a quantizer that ModelOpt put there."""
        for tensor, path in skeleton.module_paths().items():
            module = skeleton.model.get_submodule(path)
            found = [name for name, child in module.named_children() if re.search(r"weight_quantizers?$", name)]
            on = any(
                quantizer.is_enabled
                for name in found
                for quantizer in (lambda c: c if hasattr(c, "__iter__") else [c])(getattr(module, name))
            )
            if not on:
                raise CalibrationError(
                    f"{tensor}: ModelOpt puts no quantizer on {path} ({type(module).__name__})",
                    remedy="put it into ignore, or choose backend: llmcompressor",
                )

    def calibrate(self, layer: Layer, forward: Callable[[], None], probe: Callable[[], Any]) -> Observed:
        """ModelOpt's max calibration; its weight quantizers see their weight once, not once a batch."""
        import modelopt.torch.quantization as mtq

        observed = Observed()
        if self.balance:
            with _without_quantizers(layer.module):
                observed.balanced, observed.notes = equalize(layer, probe)
        weights = list(_weight_quantizers(layer.module))

        def loop(_module: Any) -> None:
            for quantizer in weights:
                quantizer.disable()
            try:
                forward()
            finally:
                for quantizer in weights:
                    quantizer.enable()

        with quiet():
            try:
                mtq.calibrate(layer.module, "max", forward_loop=loop)
            except AssertionError as error:  # its calibrator's word for NaN and Inf
                raise CalibrationError(
                    f"{layer.prefix}: an activation is not finite ({str(error).splitlines()[0]}); the checkpoint is "
                    "damaged, or overflows in BF16"
                ) from None
        if layer.attention is not None and self.kv_cache:
            for key in "kvq":
                quantizer = getattr(layer.attention_module, f"{key}_bmm_quantizer", None)
                if quantizer is not None and quantizer.is_enabled:
                    observed.attention[key] = _amax(quantizer)
        return observed

    # --- results ---

    def finish(self, layer: Layer, observed: Observed) -> dict[str, Any]:
        """FP8 values and scales of every linear layer and expert, KV scales, and biases that equalization changed."""
        import torch

        made: dict[str, Any] = {}
        shared = {} if self.exact else _shared_ranges(layer)
        for name, module in layer.linears.items():
            amax = shared.get(name) or _amax(module.weight_quantizer)
            self._pack(made, name, module.weight, amax, module.input_quantizer, observed)
        for block in layer.experts:
            for name, weight, quantizer, inputs in _expert_parts(block):
                self._pack(made, name, weight, _amax(quantizer), inputs, observed)
        if layer.attention is not None and self.kv_cache:
            self._add_cache_scales(made, layer, observed)
        for modules, against, exponent in observed.balanced:
            for name, power in ((modules, exponent), (against, -exponent)):
                if f"{name}.bias" in layer.tensors and not name.endswith(BEHIND):
                    made[f"{name}.bias"] = self._bias(layer, name, power)
        on_cpu = torch.device(layer.device).type == "cpu"
        return {name: value.detach().to("cpu", copy=not on_cpu) for name, value in made.items()}

    @staticmethod
    def _bias(layer: Layer, name: str, power: int) -> Any:
        """An equalized bias in the source's dtype; in BF16 it is what the layer ran with."""
        import torch

        raw = layer.tensors[f"{name}.bias"]
        return layer.linears[name].bias if raw.dtype == torch.bfloat16 else raw * 2.0**power

    def _pack(self, made: dict[str, Any], name: str, weight: Any, amax: float, inputs: Any, observed: Observed) -> None:
        import torch
        from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, to_quantized_weight

        scales = []
        for value, word in ((amax, "the weight"), (_amax(inputs), "the input")):
            if not math.isfinite(value) or (value == 0 and self.exact):
                raise CalibrationError(
                    f"{name}: {word} reaches {value}, which gives no scale",
                    remedy="is the checkpoint damaged? To keep this module in BF16 name it in ignore",
                )
            if value == 0:
                observed.notes.append(f"{name}: {word} is zero throughout; its scale is 1.0")
            scales.append(_as_modelopt(value, weight.device) if self.exact else torch.tensor(value / _BOUND or 1.0))
        factor, inward = scales
        if not self.exact:
            # A BF16 weight is divided in BF16 on a CPU, which rounds an F32 scale first; one that is BF16 already is
            # the same number for the cast, for the server, and on every device.
            factor = torch.tensor(bf16_up(factor.item()))
        made[f"{name}.weight"] = to_quantized_weight(weight.detach(), factor, QUANTIZATION_FP8)
        made[f"{name}.weight_scale"] = factor
        made[f"{name}.input_scale"] = inward

    def _add_cache_scales(self, made: dict[str, Any], layer: Layer, observed: Observed) -> None:
        assert layer.attention is not None
        if self.exact:
            for key in "kv":
                if not usable(amax := observed.attention.get(key, math.nan)):
                    raise CalibrationError(f"{layer.attention}: {key} reaches {amax}, which gives no scale")
                made[f"{layer.attention}.{key}_proj.{key}_scale"] = _as_modelopt(amax, layer.device)
            return
        made.update(scale_tensors(layer.attention, observed, MODELOPT_NAMES))


_BOUND = E4M3_MAX


def _amax(quantizer: Any) -> float:
    """What a quantizer has seen, as Python's float; NaN where it has seen nothing."""
    found = getattr(quantizer, "_amax", None)
    return math.nan if found is None else float(found.float().item())


def _as_modelopt(amax: float, device: Any) -> Any:
    """A scale as ModelOpt divides it: in F32 where the amax is, which on a GPU may be a bit off the quotient."""
    import torch

    return torch.tensor(amax, dtype=torch.float32, device=device) / _BOUND


def _weight_quantizers(module: Any) -> Iterator[Any]:
    for child in module.modules():
        for name, quantizer in child.named_children():
            if re.search(r"weight_quantizers?$", name):
                for each in quantizer if hasattr(quantizer, "__iter__") else [quantizer]:
                    if each.is_enabled:
                        yield each


def _expert_parts(block: Experts) -> Iterator[tuple[str, Any, Any, Any]]:
    """Every expert's output module: name, weight, its quantizer and the quantizer of its input.

    Gate and up have one quantizer and so one scale; all experts share the quantizer of what goes in, as vLLM does.
    """
    module = block.module
    for expert, (gate, up, down) in enumerate(block.names):
        both, half = module.gate_up_proj[expert], module.gate_up_proj.shape[1] // 2
        quantizer, inputs = module.gate_up_proj_weight_quantizers[expert], module.gate_up_proj_input_quantizer
        yield gate, both[:half], quantizer, inputs
        yield up, both[half:], quantizer, inputs
        yield (
            down,
            module.down_proj[expert],
            module.down_proj_weight_quantizers[expert],
            module.down_proj_input_quantizer,
        )


def _shared_ranges(layer: Layer) -> dict[str, float]:
    shared = {}
    for group in fused_groups(layer.linears):
        largest = max(_amax(layer.linears[name].weight_quantizer) for name in group)
        shared.update(dict.fromkeys(group, largest))
    return shared


def _unknown_parts(skeleton: Skeleton, selection: Selection) -> list[str]:
    """Parts of the checkpoint that the model's class has no module for, such as layers of multi-token prediction."""
    known = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    parts = dict.fromkeys(selection.outside, True)
    for name in selection.choices:
        for part in parts:
            if name.startswith(f"{part}.") and skeleton.path_of(name) in known:
                parts[part] = False
    return [part for part, unknown in parts.items() if unknown]


def ignore_entries(selection: Selection) -> list[str]:
    """Modules that stay as they are: each by name, and parts outside the language model with all below them.

    vLLM matches these with fnmatch on names that it may have changed: ``visual`` becomes part of other paths, so a
    part is named by its last word between stars.
    """
    entries = list(selection.kept_linears)
    for part in selection.outside:
        last = part.rpartition(".")[2]
        if not last.isdigit():
            entries.append(f"*{last}*")
    return list(dict.fromkeys(entries))


def requantize(
    weight: memoryview,
    dtype: str,
    rows: int,
    columns: int,
    stored: Mapping[str, tuple[str, bytes]],
    power: int,
    options: Mapping[str, Any],
) -> Requantized:
    """A weight packed once more with its stored scale; see `pipeline.formats.base.Requantize`.

    Raises:
        NonFiniteWeight: it holds NaN or Inf.
    """
    import torch
    from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, to_quantized_weight

    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    values = torch.frombuffer(weight, dtype=kind).view(rows, columns).to(torch.bfloat16)
    if not bool(values.isfinite().all()):
        raise NonFiniteWeight(None)
    scale = stored.get("weight_scale")
    if "weight" not in stored or scale is None or scale[0] != "F32" or len(scale[1]) != 4:
        return Requantized({}, unusable="weight")
    values = values * 2.0**power
    factor = torch.frombuffer(bytearray(scale[1]), dtype=torch.float32).view(())
    reach = float(values.abs().amax()), float(factor) * E4M3_MAX
    if reach[0] and not reach[0] * (1 - 2.0**-20) <= reach[1]:
        return Requantized({}, unusable="weight_scale", reach=reach)
    made = to_quantized_weight(values, factor, QUANTIZATION_FP8).view(torch.uint8).numpy().tobytes()
    return Requantized({"weight": made}, reach=reach)


def repeats(identity: Mapping[str, Any]) -> bool:
    """Whether a CPU gives the bits of a run again.

    It does not for exact mode on a GPU: a BF16 weight is divided by ModelOpt's own F32 scale in F32 there, in BF16 on a
    CPU.
    """
    options = identity.get("backend_options") or {}
    return not options.get("exact") or str(identity.get("device")).startswith("cpu")


# --- cross-layer equalization ------------------------------------------------------------------------

BEHIND = ("o_proj", "down_proj")  # their biases are added behind the scaling
# What may stand in an attention or an MLP that is equalized: with anything else between, a scale may not pass through.
ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"})
MLP_PARTS = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


def equalize(layer: Layer, probe: Callable[[], Any]) -> tuple[list[tuple[str, str, int]], list[str]]:
    """Bring what shares a scale to a like size, by powers of two along directions that change no output.

    up against down, v against o, and q against k where no norm stands between them: a row scaled by 2^a meets a
    column scaled by 2^-a, which BF16 does exactly. It is looked at: where the layer's output changes by a bit,
    everything is undone. Experts are left alone: they share the amax of what goes into down, which scaling one
    expert's up would leave.

    Args:
        layer: loaded, no quantizer at work.
        probe: the layer's output for one batch.

    Returns:
        What was done, as (scaled modules, modules scaled against them, exponent), and what could not be.
    """
    import torch

    done: list[tuple[str, str, int]] = []
    notes: list[str] = []
    before: Any = None
    for group in fused_groups(layer.linears):
        parent = group[0].rpartition(".")[0]
        sizes = {name.rpartition(".")[2]: _size(layer.linears[name].weight) for name in group}
        if min(sizes.values()) <= 0 or max(sizes.values()) / min(sizes.values()) <= BALANCE_FROM:
            continue
        if before is None:
            before = probe().clone()
        listed = ", ".join(f"{name} {value:.3g}" for name, value in sizes.items())
        here: list[tuple[str, str, int]] = []
        for one, other, exponent in _exponents(sizes, layer, group[0]):
            names = f"{parent}.{one}", f"{parent}.{other}"
            modules = [layer.linears.get(name) for name in names]
            if None in modules or not _scale(modules[0], modules[1], exponent, both=other == "k_proj"):
                continue
            here.append((*names, exponent))
            sizes[one] *= 2.0**exponent
            if other in sizes:
                sizes[other] *= 2.0**-exponent
        if here and not torch.equal(probe(), before):
            for one, other, exponent in reversed(here):
                _scale(layer.linears[one], layer.linears[other], -exponent, both=other.endswith("k_proj"))
            notes.append(
                f"{parent}: its modules differ in size ({listed}); equalizing them changed an output, so it was undone"
            )
            continue
        done += here
        left = max(sizes.values()) / min(sizes.values())
        if left > BALANCE_FROM:
            notes.append(
                f"{parent}: fused modules differ in size ({listed}) and cannot be brought closer than "
                f"{left:.3g} times without changing an output; small weights may lose precision"
            )
    return done, notes


def _exponents(sizes: dict[str, float], layer: Layer, member: str) -> Iterator[tuple[str, str, int]]:
    """(part, against, exponent) in the order in which they are to be done."""
    owner, parts = _owner(layer, layer.linears[member])
    if {"gate_proj", "up_proj"} <= sizes.keys():
        if parts <= MLP_PARTS:
            yield "up_proj", "down_proj", round(math.log2(sizes["gate_proj"] / sizes["up_proj"]))
        return
    clipped = getattr(getattr(owner, "config", None), "clip_qkv", None)
    if not {"q_proj", "k_proj", "v_proj"} <= sizes.keys() or not parts <= ATTENTION_PARTS or clipped is not None:
        return
    q, k = sizes["q_proj"], sizes["k_proj"]
    if not parts & {"q_norm", "k_norm"}:
        exponent = round(math.log2(k / q) / 2)
        yield "q_proj", "k_proj", exponent
        q, k = q * 2.0**exponent, k * 2.0**-exponent
    yield "v_proj", "o_proj", round(math.log2(max(q, k) / sizes["v_proj"]))


def _owner(layer: Layer, linear: Any) -> tuple[Any, set[str]]:
    """The module that a linear layer stands in, and the names of what stands there, observers left out."""
    for module in layer.module.modules():
        if any(child is linear for child in module.children()):
            children = {name for name, child in module.named_children() if child is not None}
            return module, {name for name in children if not name.endswith("_quantizer")}
    return None, {"?"}


def _size(weight: Any) -> float:
    return float(weight.detach().abs().amax().item())


def _scale(module: Any, against: Any, exponent: int, both: bool) -> bool:
    """Scale `module`'s rows and bias by 2^exponent and `against` by its inverse; False where BF16 would round.

    With `both`, `against` also makes outputs (k against q), so that its bias goes with it.
    """
    if exponent == 0:
        return False
    changes = [(module.weight, exponent), (module.bias, exponent), (against.weight, -exponent)]
    if both:
        changes.append((against.bias, -exponent))
    changes = [(value, power) for value, power in changes if value is not None]
    if not all(_exact(value, power) for value, power in changes):
        return False
    for value, power in changes:
        value.data.mul_(2.0**power)
    return True


def _exact(value: Any, power: int) -> bool:
    """Whether multiplying by 2^power and back gives the same values, none of them infinite."""
    import torch

    scaled = value.detach() * 2.0**power
    return bool(torch.equal(scaled * 2.0**-power, value.detach()) and scaled.isfinite().all())


@contextmanager
def _without_quantizers(module: Any) -> Iterator[None]:
    """No quantizer does anything within: those that were never calibrated would quantize as they see fit."""
    found = [child for child in module.modules() if hasattr(child, "disable_quant") and child.is_enabled]
    for quantizer in found:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.enable()
