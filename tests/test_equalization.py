"""Cross-layer equalization by powers of two: no output changes by a bit, and small weights keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.backends.modelopt import BALANCE_FROM, ModelOptFP8, equalize
from pipeline.calibration.batches import make_batches
from tests.conftest import all_tensors, damaged, value
from tests.layers import SEQUENCES, build
from tests.warm import Warm

UP = {"k_proj": 8, "o_proj": 7, "down_proj": 6}  # times 2^n, in weight and bias; the others against them
DOWN = {"q_proj": 8, "v_proj": 7, "up_proj": 6}


def add_outliers(name: str, data: bytearray, skip: tuple[str, ...] = ()) -> None:
    """Large keys, small values and ups, with the same logits: exact in BF16."""
    import torch

    if "layers." not in name or "vision" in name or "visual" in name:
        return
    module = name.rsplit(".", 2)[-2]
    if module in skip:
        return
    power = UP.get(module, 0) - DOWN.get(module, 0)
    if name.endswith("o_proj.bias") or name.endswith("down_proj.bias"):
        power = 0  # what they add stands behind the scaling
    if power:
        torch.frombuffer(data, dtype=torch.bfloat16).mul_(2.0**power)


def run_layers(
    source: Path, change: Callable[[Any, Callable[[], Any]], None] = lambda layer, probe: None
) -> tuple[list[Any], list[Any]]:
    """Every layer's outputs for some sequences, and the layers' modules after `change`."""
    import torch

    skeleton, selection, tensor = build(source)
    batches = make_batches(SEQUENCES, 512).batches
    table = tensor(skeleton.embedding_tensor)
    inputs = list(skeleton.first_inputs(batches, lambda ids: table[ids]))
    states = [state for state, _ in inputs]
    outputs, layers = [], []
    for index in range(selection.layers):
        names = [n for n, choice in selection.choices.items() if choice.layer == index]
        layer = skeleton.load_layer(index, {n: tensor(n).clone() for n in names})

        def run(number: int, layer: Any = layer, index: int = index) -> Any:
            result = layer.module(states[number], **inputs[number][1][index])
            return result[0] if isinstance(result, tuple) else result

        with torch.no_grad():
            change(layer, lambda: run(len(inputs) - 1))
            for number in range(len(inputs)):
                states[number] = run(number)
        outputs += [state.clone() for state in states]
        layers.append(layer)
    return outputs, layers


QK_NORM = ("qwen3", "qwen3_vl", "gemma3_text", "qwen3_moe", "qwen3_vl_moe")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2_5_vl", "mistral", *QK_NORM])
def test_no_output_changes_by_a_bit(name: str, small_model: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    original = small_model(name)
    skip = ("q_proj", "k_proj") if name in QK_NORM else ()
    source = damaged(original, tmp_path / "outliers", lambda n, d: add_outliers(n, d, skip))
    done: list[Any] = []

    def change(layer: Any, probe: Callable[[], Any]) -> None:
        found, notes = equalize(layer, probe)
        assert notes == []
        done.extend(found)

    expected, _ = run_layers(original)
    outliers, _ = run_layers(source)
    equalized, layers = run_layers(source, change)
    assert all(torch.equal(a, b) for a, b in zip(expected, outliers, strict=True)), "the outliers change no output"
    assert all(torch.equal(a, b) for a, b in zip(outliers, equalized, strict=True))
    kinds = {(one.rpartition(".")[2], other.rpartition(".")[2]) for one, other, _ in done}
    assert ("v_proj", "o_proj") in kinds
    assert (("q_proj", "k_proj") in kinds) == (name not in QK_NORM)
    for layer in layers:
        sizes = {n.rpartition(".")[2]: float(m.weight.detach().abs().max()) for n, m in layer.linears.items()}
        attention = [sizes[f"{part}_proj"] for part in "qkv"]
        assert max(attention) / min(attention) <= BALANCE_FROM
        if "up_proj" in sizes:
            assert max(sizes["up_proj"], sizes["gate_proj"]) / min(sizes["up_proj"], sizes["gate_proj"]) <= 2


def test_experts_are_left_alone(small_model: Callable[[str], Path]) -> None:
    """They share the range of what goes into down: scaling one expert's up would leave it."""

    def look(layer: Any, probe: Callable[[], Any]) -> None:
        for block in layer.experts:
            half = block.module.gate_up_proj.shape[1] // 2
            block.module.gate_up_proj.data[2, half:] *= 2.0**-6
        assert [entry for entry in equalize(layer, probe)[0] if ".experts." in entry[0]] == []

    run_layers(small_model("qwen3_moe"), look)


def test_what_changes_an_output_is_undone(small_model: Callable[[str], Path]) -> None:
    """A clamp between v and o, as some models have one, that no name gives away."""
    import torch

    def look(layer: Any, probe: Callable[[], Any]) -> None:
        (values,) = (module for name, module in layer.linears.items() if name.endswith("v_proj"))
        values.weight.data *= 2.0**-10
        before = {name: module.weight.detach().clone() for name, module in layer.linears.items()}
        hook = values.register_forward_hook(lambda _m, _a, out: out.clamp(-1e-4, 1e-4))
        done, notes = equalize(layer, probe)
        hook.remove()
        assert [entry for entry in done if entry[0].endswith("v_proj")] == []
        assert len(notes) == 1 and "equalizing them changed an output, so it was undone" in notes[0]
        assert all(torch.equal(module.weight, before[name]) for name, module in layer.linears.items())

    run_layers(small_model("llama"), look)


@pytest.mark.parametrize("part", ["attn_sub_norm", "q_layernorm", "v_norm"])
def test_parts_that_are_not_known_are_in_the_way(part: str, small_model: Callable[[str], Path]) -> None:
    import torch

    def look(layer: Any, probe: Callable[[], Any]) -> None:
        layer.attention_module.add_module(part, torch.nn.Identity())
        for name, module in layer.linears.items():
            if name.endswith("v_proj"):
                module.weight.data *= 2.0**-10
        assert equalize(layer, probe)[0] == []

    run_layers(small_model("llama"), look)


def test_what_cannot_be_equalized_is_reported(small_model: Callable[[str], Path]) -> None:
    """With a norm between, keys cannot be scaled against queries."""
    notes: list[str] = []

    def widen_keys(layer: Any, probe: Callable[[], Any]) -> None:
        for name, module in layer.linears.items():
            if name.endswith("k_proj"):
                module.weight.data *= 2.0**8
        done, found = equalize(layer, probe)
        assert not [entry for entry in done if entry[0].endswith("q_proj")]
        notes.extend(found)

    run_layers(small_model("qwen3"), widen_keys)
    assert len(notes) == 3 and all("cannot be brought closer than" in note for note in notes)


def test_models_in_order_are_left_alone(small_model: Callable[[str], Path]) -> None:
    def look(layer: Any, probe: Callable[[], Any]) -> None:
        assert equalize(layer, probe) == ([], [])

    run_layers(small_model("qwen2_5_vl"), look)


def errors(tensors: dict[str, Any], source: dict[str, Any], powers: dict[str, int]) -> dict[str, float]:
    """Relative squared error of every quantized weight, the equalization undone."""
    import torch

    found = {}
    for name, (dtype, _, data) in tensors.items():
        if dtype != "F8_E4M3":
            continue
        module = name.removesuffix(".weight")
        codes = torch.frombuffer(bytearray(data), dtype=torch.float8_e4m3fn).float()
        weight = torch.frombuffer(bytearray(source[name][2]), dtype=torch.bfloat16).float()
        made = codes * value(tensors[f"{module}.weight_scale"]) * 2.0 ** -powers.get(module, 0)
        found[module] = float(((made - weight) ** 2).sum() / (weight**2).sum())
    return found


def test_outliers_keep_their_precision(
    small_model: Callable[[str], Path],
    convert: Callable[..., Path],
    tmp_path: Path,
    warm: Warm,
) -> None:
    """Stock: q, v and up drown under one shared scale. Equalized: no weight is worse than without outliers."""
    import json

    original = small_model("qwen2_5_vl")
    source = damaged(original, tmp_path / "outliers", add_outliers)
    plain = errors(all_tensors(convert(original, "modelopt", "plain")), all_tensors(original), {})
    output = convert(source, "modelopt", "equalized")
    report = json.loads((output / "quantize" / "calibration.json").read_text())
    powers: dict[str, int] = {}
    for layer in report["layers"]:
        for one, other, exponent in layer["balanced"]:
            powers[one], powers[other] = powers.get(one, 0) + exponent, powers.get(other, 0) - exponent
    tensors = all_tensors(output)
    equalized = errors(tensors, all_tensors(source), powers)
    stock = convert(source, "modelopt", "stock", "backend_options: {balance: false}\n")
    lost = errors(all_tensors(stock), all_tensors(source), {})
    for module, error in equalized.items():
        assert error < 1.1 * max(plain.values()), module
    assert max(error for module, error in lost.items() if module.endswith(("v_proj", "q_proj"))) > 0.02
    assert any("changes no output" in line for line in report["findings"])
    biases = [n for n in tensors if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    assert biases and any(tensors[n] != all_tensors(source)[n] for n in biases)
    done = warm("verify", output, "--source", source, "--level", "structure")
    assert done.returncode == 0, done.stdout
    assert "modules were equalized" in done.stdout


def test_below_the_threshold_a_shared_scale_costs_next_to_nothing() -> None:
    """Why BALANCE_FROM is what it is: normal weights, scaled as if a sibling were so many times larger."""
    import torch
    from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, to_quantized_weight

    torch.manual_seed(0)
    weight = (torch.randn(512, 512) * 0.02).to(torch.bfloat16)

    def error(ratio: float) -> float:
        scale = torch.tensor(float(weight.abs().max()) * ratio / 448)
        made = to_quantized_weight(weight, scale, QUANTIZATION_FP8).float() * scale
        return float(((made - weight.float()) ** 2).sum() / (weight.float() ** 2).sum())

    assert error(BALANCE_FROM) < 1.02 * error(1.0)
    assert error(2.0**14) > 1.2 * error(1.0)


def test_exact_mode_never_equalizes() -> None:
    assert ModelOptFP8(True).balance and not ModelOptFP8(True, exact=True).balance
