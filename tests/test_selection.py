"""The selection against the transformers classes themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.source import open_checkpoint
from pipeline.model.selection import TESTED_MODEL_TYPES, quantizable_modules, select
from tests import families


def linears_of_the_language_model(name: str) -> set[str]:
    """What a meta-device skeleton says: Linear modules of the decoder, routers and gates left out, by hub names.

    Experts that transformers keeps in one 3-D parameter count as one module an expert and projection.
    """
    import torch

    model = families.build(name, "meta")
    decoder = model.get_decoder()
    paths = {module: path for path, module in model.named_modules()}
    prefix = paths[decoder]
    found: set[str] = set()
    for path, module in decoder.named_modules():
        kind, parent = type(module).__name__, path.rpartition(".")[0]
        whole = f"{prefix}.{path}" if prefix else path
        if isinstance(module, torch.nn.Linear):
            siblings = decoder.get_submodule(parent)
            if "Router" in kind or "Gate" in kind or hasattr(siblings, "experts"):
                continue
            found.add(to_hub(model, f"{whole}.weight").removesuffix(".weight"))
        elif kind.endswith("Experts"):
            names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            block = to_hub(model, f"{whole}.down_proj").rpartition(".experts")[0] + ".experts"
            found |= {f"{block}.{e}.{part}" for e in range(module.num_experts) for part in names}
    return found


def to_hub(model, name: str) -> str:
    """A parameter's name on the hub, by transformers' own conversion mapping, as saving applies it."""
    for conversion in reversed(model_conversions(model)):
        renamed, matched = conversion.reverse_transform().rename_source_key(name)
        if matched is not None:
            name = renamed
    return re.sub(r"\.experts\.\*?\.?\d*\.?(w2|down_proj)(\.weight)?$", ".experts.down_proj", name)


def model_conversions(model) -> list:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_selects_what_the_transformers_class_says(name: str, small_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(small_model(name))
    selection = select(checkpoint)
    ours = set(quantizable_modules(checkpoint, selection.choices, selection.expert_layouts))
    assert ours == linears_of_the_language_model(name)
    assert not selection.warnings
    outside = {n.split(".")[0] for n in selection.outside}
    assert ("vision_config" in checkpoint.config) == bool(outside - {"lm_head"})


def test_every_tested_family_has_a_test() -> None:
    tested = {families.build(name, "meta").config.model_type for name in families.FAMILIES}
    assert tested == TESTED_MODEL_TYPES
