"""What a source lacks, or has too much of, is said before any work: by headers, config and transformers' class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import SourceError, open_checkpoint
from pipeline.model.completeness import by_class, check_complete, refuse_adapters
from pipeline.model.selection import select
from pipeline.plan.plan import make_plan
from pipeline.recipe import recipe as recipes
from tests import families
from tests.conftest import RECIPE, make_plain_checkpoint, read_shard, write_shard
from tests.damage import edit_config

Tensors = dict[str, tuple[dict[str, Any], bytes]]


def changed(source: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy of a checkpoint in one shard, with its tensors changed."""
    shutil.copytree(source, target)
    tensors: Tensors = {}
    for path in [*sorted(target.glob("*.safetensors")), *target.glob("*.index.json")]:
        if path.suffix == ".safetensors":
            header, data = read_shard(path)
            header.pop("__metadata__", None)
            tensors |= {name: (entry, data[slice(*entry["data_offsets"])]) for name, entry in header.items()}
        path.unlink()
    change(tensors)
    fresh, body = {}, b""
    for name, (entry, raw) in tensors.items():
        fresh[name] = {**entry, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    write_shard(target / "model.safetensors", fresh, body)
    return target


def refusal(source: Path) -> str:
    """What the plan says; empty where it takes the source."""
    recipe = recipes.parse(RECIPE.format(source=source, output=source.parent / "out"))
    try:
        make_plan(recipe, open_checkpoint(source))
    except SourceError as error:
        return str(error)
    return ""


def rows(name: str, more: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        entry, raw = tensors[name]
        count, width = entry["shape"]
        tensors[name] = ({**entry, "shape": [count + more, width]}, raw + raw[: more * width * 2])

    return change


def again(old: str, new: str) -> Callable[[Tensors], None]:
    """Copy what stands below a name to another one."""
    return lambda tensors: tensors.update({n.replace(old, new): t for n, t in tensors.items() if n.startswith(old)})


def prefixed(prefix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


def lora(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        entry, raw = tensors.pop(name)
        module = name.removesuffix(".weight")
        tensors[f"{module}.base_layer.weight"] = (entry, raw)
        for part, shape in (("lora_A", [4, 64]), ("lora_B", [64, 4])):
            tensors[f"{module}.{part}.default.weight"] = ({**entry, "shape": shape}, raw[: 4 * 64 * 2])


HEADERS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no head": (lambda t: t.pop("lm_head.weight"), "there is no lm_head.weight, and config.json says"),
    "no final norm": (lambda t: t.pop("model.norm.weight"), "there is no final norm (model.norm.weight)"),
    "a layer without a norm": (
        lambda t: t.pop("model.layers.1.input_layernorm.weight"), "model.layers.1 has no input_layernorm.weight"),
    "a bias without its weight": (
        lambda t: t.update({"extra.proj.bias": t["model.norm.weight"]}), "no extra.proj.weight beside extra.proj.bias"),
    "a bias of one layer": (
        lambda t: t.update({f"model.layers.0.self_attn.{k}_proj.bias": t["model.norm.weight"] for k in "qkv"}),
        "model.layers.1 has no self_attn.k_proj.bias"),
    "biases of q and v alone": (
        lambda t: t.update({f"model.layers.{n}.self_attn.{k}_proj.bias": t["model.norm.weight"]
                            for k in "qv" for n in (0, 1)}),
        "no model.layers.0.self_attn.k_proj.bias beside"),
    "a resized embedding": (rows("model.embed_tokens.weight", 8), "embed_tokens.weight has 136 rows"),
    "a resized head": (rows("lm_head.weight", 8), "lm_head.weight has 136 rows, but config.json says vocab_size 128"),
    "a layer more": (again("model.layers.1.", "model.layers.2."), "the shards hold model.layers.2, a layer like"),
    "layers beyond a gap": (again("model.layers.1.", "model.layers.7."), "the shards hold model.layers.7"),
    "an adapter": (lora, "q_proj.base_layer.weight belongs to an adapter"),
    "an adapter's wrapper": (prefixed("base_model.model."), "belongs to an adapter"),
    "DoRA": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": t["model.norm.weight"]}),
        "lora_magnitude_vector belongs to an adapter"),
    "torchtune's names": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_a.weight": t["model.norm.weight"]}),
        "lora_a.weight belongs to an adapter"),
    "a wrapper of DDP": (prefixed("module."), "begin with 'module.'"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HEADERS))
def test_headers_and_config_show_it(name: str, tmp_path: Path) -> None:
    change, words = HEADERS[name]
    plain = make_plain_checkpoint(tmp_path / "plain", shards=1)
    assert refusal(plain) == ""
    assert words in refusal(changed(plain, tmp_path / "changed", change))


def test_remedies_can_be_followed(tmp_path: Path) -> None:
    plain = make_plain_checkpoint(tmp_path / "plain", shards=1)
    source = changed(plain, tmp_path / "more", again("model.layers.1.", "model.layers.2."))
    assert "set num_hidden_layers to 3" in refusal(source)
    edit_config(source, lambda config: config.update(num_hidden_layers=3))
    assert refusal(source) == ""
    source = changed(plain, tmp_path / "rows", lambda t: (rows("lm_head.weight", 8)(t), rows(EMBEDDING, 8)(t)))
    assert "set vocab_size to 136" in refusal(source)
    edit_config(source, lambda config: config.update(vocab_size=136))
    assert refusal(source) == ""
    assert "merge_and_unload()" in refusal(changed(plain, tmp_path / "lora", lora))


EMBEDDING = "model.embed_tokens.weight"


def test_what_only_looks_like_it_is_taken(tmp_path: Path) -> None:
    """A tied head that is in no file, a model without a head, multi-token prediction, rotary buffers of one layer."""
    plain = make_plain_checkpoint(tmp_path / "plain", shards=1)
    tied = changed(plain, tmp_path / "tied", lambda t: t.pop("lm_head.weight"))
    edit_config(tied, lambda config: config.update(tie_word_embeddings=True))
    assert refusal(tied) == ""
    edit_config(tied, lambda config: config.update(tie_word_embeddings=False, architectures=["LlamaModel"]))
    assert refusal(tied) == ""

    def predict(tensors: Tensors) -> None:
        again("model.layers.1.", "model.layers.2.")(tensors)
        tensors["model.layers.2.enorm.weight"] = tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"]

    source = open_checkpoint(changed(plain, tmp_path / "mtp", predict))
    (said,) = check_complete(source, select(source))
    assert "model.layers.2 is beyond num_hidden_layers (2) and of another kind" in said


def test_families_that_are_not_known_are_warned_of(tmp_path: Path) -> None:
    """Llama 3.2 Vision's embedding has eight rows more by design; a class that nobody here knows may do as it likes."""
    plain = make_plain_checkpoint(tmp_path / "plain", shards=1, config={"model_type": "mllama"})
    source = open_checkpoint(changed(plain, tmp_path / "rows", rows(EMBEDDING, 8)))
    (said,) = check_complete(source, select(source))
    assert "136 rows" in said and said.endswith("is the checkpoint complete?")


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_sound_checkpoints_lack_nothing(name: str, small_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(small_model(name))
    refuse_adapters(checkpoint)
    selection = select(checkpoint)
    assert check_complete(checkpoint, selection) == []
    assert by_class(checkpoint, selection, strict=True) == []


@pytest.mark.parametrize(
    ("family", "gone", "by_headers", "words"),
    [
        ("qwen3_vl", "model.visual.deepstack_merger_list.0.norm.weight", True, "deepstack_merger_list.0 has no norm"),
        ("qwen2_5_vl", "visual.blocks.1.mlp.up_proj.bias", True, "visual.blocks.1 has no mlp.up_proj.bias"),
        ("qwen2_5_vl", "visual.merger.ln_q.weight", False, "nothing in the shards becomes model.visual.merger.ln_q"),
        ("qwen2_5_vl", "visual.merger.mlp.2.weight", True, "there is no visual.merger.mlp.2.weight beside"),
        ("llava", "multi_modal_projector.linear_1.weight", True, "there is no multi_modal_projector.linear_1.weight"),
    ],
)
def test_parts_outside_the_language_model(
    family: str, gone: str, by_headers: bool, words: str, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """What no header shows, such as a lost norm that stands alone, the class knows: a calibrated run asks it."""
    source = changed(small_model(family), tmp_path / "source", lambda tensors: tensors.pop(gone))
    assert (words in refusal(source)) == by_headers
    text = (
        f"model: {{source: '{source}'}}\noutput: '{tmp_path / 'out'}'\nbackend: modelopt\nscheme: fp8\n"
        "calibration: {captions: embedded, samples: 2}\nverify: structure\n"
    )
    with pytest.raises(SourceError, match=words.replace(".", r"\.")):
        make_plan(recipes.parse(text), open_checkpoint(source))


def test_a_vision_config_without_a_vision_tower(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    def text_alone(tensors: Tensors) -> None:
        for name in [name for name in tensors if "visual" in name]:
            tensors.pop(name)

    source = changed(small_model("qwen3_vl"), tmp_path / "source", text_alone)
    assert "vision_config, but the shards hold nothing outside the language model" in refusal(source)
    assert json.loads((source / "config.json").read_text())["vision_config"]
