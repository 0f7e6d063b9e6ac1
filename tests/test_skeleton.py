"""Layers filled one at a time are what from_pretrained makes, and compute what the whole model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.calibration.batches import make_batches
from pipeline.checkpoint.source import SourceError
from tests import families
from tests.layers import SEQUENCES, build


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_layer_by_layer_is_the_whole_model(name: str, small_model: Callable[[str], Path]) -> None:
    import torch
    import transformers

    source = small_model(name)
    skeleton, selection, tensor = build(source)
    whole = getattr(transformers, families.FAMILIES[name]["class"]).from_pretrained(source, dtype=torch.bfloat16).eval()
    expected = whole.state_dict()
    batches = make_batches(SEQUENCES, 512).batches
    table = tensor(skeleton.embedding_tensor)
    inputs = list(skeleton.first_inputs(batches, lambda ids: table[ids]))
    states = [state for state, _ in inputs]
    weights = 0
    for index in range(selection.layers):
        names = [n for n, choice in selection.choices.items() if choice.layer == index]
        layer = skeleton.load_layer(index, {n: tensor(n) for n in names})
        for path, parameter in layer.module.named_parameters():
            assert torch.equal(parameter, expected[f"{skeleton.stack}.{index}.{path}"]), path
        weights += len(layer.linears) + sum(len(block.names) * 3 for block in layer.experts)
        assert layer.attention is not None and layer.attention_module is not None
        with torch.no_grad():
            for number, (_, calls) in enumerate(inputs):
                result = layer.module(states[number], **calls[index])
                states[number] = result[0] if isinstance(result, tuple) else result
        skeleton.drop_layer(index)
    roles = [choice.role for choice in selection.choices.values()]
    fused = sum(3 * layout.experts for layout in selection.expert_layouts.values())
    assert weights == roles.count("linear") + fused
    last = whole.get_submodule(skeleton.stack)[-1]
    with torch.no_grad():
        for batch, state in zip(batches, states, strict=True):
            caught: list[Any] = []
            hook = last.register_forward_hook(lambda _m, _a, out, caught=caught: caught.append(out))
            whole(input_ids=torch.tensor(batch.ids, dtype=torch.long).view(batch.rows, batch.length), use_cache=False)
            hook.remove()
            out = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
            assert torch.equal(out, state)


def test_nothing_but_the_layer_is_materialized(small_model: Callable[[str], Path]) -> None:
    skeleton, selection, tensor = build(small_model("qwen3_vl"))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    names = [n for n, choice in selection.choices.items() if choice.layer == 1]
    skeleton.load_layer(1, {n: tensor(n) for n in names})
    real = [n for n, parameter in skeleton.model.named_parameters() if not parameter.is_meta]
    assert real and all(n.startswith(f"{skeleton.stack}.1.") for n in real)
    held = skeleton.layers[1]
    skeleton.drop_layer(1)
    assert sum(parameter.numel() for parameter in held.parameters()) == 0
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_tensor_that_is_missing_or_of_another_shape(small_model: Callable[[str], Path]) -> None:
    skeleton, selection, tensor = build(small_model("llama"))
    names = [n for n, choice in selection.choices.items() if choice.layer == 0]
    with pytest.raises(SourceError, match=r"nothing in the shards becomes model.layers.0.mlp.up_proj.weight"):
        skeleton.load_layer(0, {n: tensor(n) for n in names if "up_proj" not in n})
    skeleton, _, _ = build(small_model("llama"))
    wrong = {n: tensor(n)[:-1] if "up_proj" in n else tensor(n) for n in names}
    with pytest.raises(SourceError, match=r"up_proj.weight: \[159, 64\] instead of \[160, 64\]"):
        skeleton.load_layer(0, wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["NoSuchModel"]}, "has no class 'NoSuchModel'"),
        ({"architectures": None}, "names no class in architectures"),
        ({"num_attention_heads": "four"}, "transformers cannot build this model"),
    ],
)
def test_configs_that_transformers_cannot_build(
    change: dict[str, Any], words: str, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(small_model("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SourceError, match=words):
        build(source)
