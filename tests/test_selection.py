"""The selection against the transformers classes themselves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.source import Checkpoint, SourceError, open_checkpoint
from pipeline.model.selection import TESTED_MODEL_TYPES, quantizable_modules, select
from tests import families
from tests.conftest import all_tensors, make_plain_checkpoint
from tests.damage import tie_head


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


# --- what real checkpoints hold besides --------------------------------------------------------------


def plain(tmp_path: Path, config: dict | None = None, **extra: tuple[int, ...]) -> Checkpoint:
    names = {name.replace("__", "."): shape for name, shape in extra.items()}
    return open_checkpoint(make_plain_checkpoint(tmp_path / "s", config=config, extra=names))


def role(checkpoint: Checkpoint, name: str) -> str:
    return select(checkpoint).choices[name].role


def test_parts_that_are_a_single_tensor_or_layer(tmp_path, quantize, write_recipe) -> None:
    """LLaVA-NeXT's image_newline, a classifier's score, a bare projector: no module below them."""
    extra = {"image_newline": (64,), "score.weight": (2, 64), "mm_projector.weight": (64, 32), "wpe.weight": (9, 64)}
    source = make_plain_checkpoint(tmp_path / "s", extra=extra)
    done = quantize(write_recipe(source))
    assert done.returncode == 0, done.stderr
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"score", "mm_projector", "wpe"} <= set(ignore)
    assert r"re:(?:.*\.)?score(?:\..*)?$" in ignore and not any("image_newline" in entry for entry in ignore)


def test_a_tied_head_of_another_name(tmp_path, quantize, write_recipe, small_model) -> None:
    source = tmp_path / "tied"
    shutil.copytree(small_model("llava"), source)
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    tie_head(source, "language_model.lm_head.weight", "language_model.model.embed_tokens.weight")
    done = quantize(write_recipe(source))
    assert done.returncode == 0, done.stderr
    assert "language_model.lm_head.weight" not in all_tensors(tmp_path / "out")


def test_only_the_head_itself_is_dropped_as_tied(tmp_path: Path) -> None:
    checkpoint = plain(
        tmp_path,
        {"tie_word_embeddings": True},
        lm_head__bias=(128,),
        projector__weight=(128, 64),
        mtp__embed_tokens__weight=(128, 64),
    )
    tie_head(checkpoint.root)
    assert role(checkpoint, "lm_head.weight") == "tied head"
    for name in ("lm_head.bias", "projector.weight", "mtp.embed_tokens.weight"):
        assert role(checkpoint, name) == "outside"


@pytest.mark.parametrize("gone", [["vocab_size"], ["hidden_size", "num_hidden_layers"],
                                  ["vocab_size", "hidden_size", "num_hidden_layers"]])  # fmt: skip
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_hub_configs_that_leave_out_their_class_defaults(name, gone, small_model, tmp_path) -> None:
    """The hub's Gemma 3 names no vocab_size in its text_config, LLaVA-1.5 neither layers nor width."""
    source = tmp_path / "hub"
    shutil.copytree(small_model(name), source)
    config = json.loads((source / "config.json").read_text())
    for key in gone:
        del config["text_config"][key]
        config.pop(key, None)
    (source / "config.json").write_text(json.dumps(config))
    assert select(open_checkpoint(source)).choices == select(open_checkpoint(small_model(name))).choices


def test_routers_wherever_they_stand(tmp_path: Path) -> None:
    block = "model.layers.{}.mlp."
    extra = {}
    for layer in range(2):
        prefix = block.format(layer)
        extra |= {f"{prefix}experts.{e}.{p}_proj.weight": (96, 64) for e in range(4) for p in ("gate", "up")}
        extra |= {f"{prefix}gate.wg.weight": (4, 64), f"{prefix}shared_expert_gate.weight": (1, 64),
                  f"{prefix}shared_expert.up_proj.weight": (96, 64)}  # fmt: skip
    checkpoint = open_checkpoint(make_plain_checkpoint(tmp_path / "s", config={"num_experts": 4}, extra=extra))
    prefix = block.format(0)
    assert role(checkpoint, f"{prefix}gate.wg.weight") == "router"
    assert role(checkpoint, f"{prefix}shared_expert_gate.weight") == "router"
    assert role(checkpoint, f"{prefix}shared_expert.up_proj.weight") == "linear"
    assert role(checkpoint, f"{prefix}gate_proj.weight") == "linear", "a dense projection beside the experts"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.mlp.input_linear.weight", "experts fused as"),
        ("model.layers.0.mlp.experts.w13", "experts fused as"),
        ("model.layers.0.mlp.experts.gate_up_proj", "which half is the gate"),
    ],
)
def test_unknown_experts_are_refused(name: str, words: str, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s", config={"num_experts": 4}, extra={name: (4, 96, 64)})
    with pytest.raises(SourceError, match=words):
        select(open_checkpoint(source))


def test_weights_stored_the_other_way_round_are_refused(tmp_path: Path) -> None:
    extra = {"model.layers.0.c_fc.weight": (64, 96), "model.layers.0.c_fc.bias": (96,)}
    with pytest.raises(SourceError, match=r"stored as \[in, out\]"):
        select(open_checkpoint(make_plain_checkpoint(tmp_path / "s", extra=extra)))


def test_odd_tensors(tmp_path, quantize, write_recipe) -> None:
    """Empty, scalar and dotless tensors, and buffers that are no weights, are copied."""
    extra = {"lonely": (128, 64), "empty.weight": (3, 0), "model.layers.0.void.weight": (5, 0), "scalar": (),
             "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}  # fmt: skip
    source = make_plain_checkpoint(tmp_path / "s", extra=extra)
    done = quantize(write_recipe(source))
    assert done.returncode == 0, done.stderr
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    for name in extra:
        assert before[name] == after[name], name


def test_a_large_mixture_is_planned_quickly_even_when_ignored(small_model) -> None:
    """No quadratic search: the number of comparisons is bounded by patterns x modules."""
    from pipeline.model import ignore

    checkpoint, calls = open_checkpoint(small_model("qwen3_moe")), 0
    original = ignore.matches

    def counting(pattern: str, module: str) -> bool:
        nonlocal calls
        calls += 1
        return original(pattern, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ignore, "matches", counting)
        select(checkpoint, ["*.mlp.experts.*"])
    assert calls < 3 * len(checkpoint.tensors)
