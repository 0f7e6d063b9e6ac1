"""Heads that the config takes for the embedding: the shards know better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.config import untied, untied_text
from pipeline.checkpoint.hub import open_checkpoint
from pipeline.errors import UsageError
from pipeline.model.selection import select
from pipeline.plan import plan as plans
from pipeline.recipe import recipe as recipes
from tests.conftest import all_tensors, make_plain_checkpoint, read_shard, write_shard
from tests.damage import tie_head

TIED = {"tie_word_embeddings": True}
TEXT = {"text_config": {**TIED, "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 128}}
VISION = {"tie_word_embeddings": None, "vision_config": TIED}


def role_of_the_head(source: Path) -> tuple[str, str | None]:
    selection = select(open_checkpoint(source))
    return selection.choices["lm_head.weight"].role, selection.own_head


@pytest.mark.parametrize(
    ("config", "copy", "other"),
    [
        (TIED, ("tied head", None), ("head", "lm_head.weight")),
        ({**TIED, **TEXT}, ("tied head", None), ("head", "lm_head.weight")),
        (
            {**TIED, "text_config": {**TEXT["text_config"], "tie_word_embeddings": False}},
            ("head", None),
            ("head", None),
        ),
        ({"tie_word_embeddings": False, **TEXT}, ("head", None), ("head", None)),
        ({"vision_config": TIED, "tie_word_embeddings": False}, ("head", None), ("head", None)),
    ],
)
def test_a_head_is_dropped_where_its_bytes_are_the_embeddings(
    config: Any, copy: Any, other: Any, tmp_path: Path
) -> None:
    source = make_plain_checkpoint(tmp_path / "s", config=config)
    assert role_of_the_head(source) == other
    assert role_of_the_head(tie_head(source)) == copy


@pytest.mark.parametrize(
    ("config", "other"), [(TEXT, "lm_head.weight"), ({"vision_config": TIED}, None), ({"audio_config": TIED}, None)]
)
def test_a_word_of_a_part_alone_drops_no_head(config: Any, other: str | None, tmp_path: Path) -> None:
    """Classes differ in whether they take up the language model's word; a vision tower's is none about the head."""
    source = make_plain_checkpoint(tmp_path / "s", config=config)
    whole = json.loads((source / "config.json").read_text())
    del whole["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(whole))
    assert role_of_the_head(source) == ("head", other)
    assert role_of_the_head(tie_head(source)) == ("head", None)


def test_one_value_is_enough_and_so_are_other_shapes(tmp_path: Path) -> None:
    source = tie_head(make_plain_checkpoint(tmp_path / "s", config=TIED, shards=1))
    path = source / "model.safetensors"
    header, data = read_shard(path)
    _, end = header["lm_head.weight"]["data_offsets"]
    write_shard(path, header, data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:])
    assert role_of_the_head(source) == ("head", "lm_head.weight")
    wide = make_plain_checkpoint(tmp_path / "w", config=TIED, extra={"lm_head.weight": (130, 64)})
    assert role_of_the_head(wide) == ("head", "lm_head.weight")


def test_the_result_says_that_its_head_is_its_own(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source", config=TIED)
    done = quantize(write_recipe(source))
    assert done.returncode == 0, done.stderr
    assert "the bytes of lm_head.weight are not those of model.embed_tokens.weight" in done.stdout + done.stderr
    made, before = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", source))
    assert made.pop("quantization_config")["ignore"] == ["lm_head"]
    assert made == {**before, "tie_word_embeddings": False} and list(made) == list(before)
    name = "lm_head.weight"
    assert all_tensors(tmp_path / "out")[name] == all_tensors(source)[name]


@pytest.mark.parametrize(
    "text",
    [
        '{"tie_word_embeddings": true}',
        '{\n  "a": "\\"tie_word_embeddings\\": true",\n  "tie_word_embeddings" : true,\n  "b": 1e-06\n}\n',
        '{"text_config": {"tie_word_embeddings": true}, "vision_config": {"tie_word_embeddings": true}, "n": 1}',
        '{"text_config": {"tie_word_embeddings": true},\n "tie_word_embeddings": true}',
        '{"text_config": {"text_config": {"tie_word_embeddings": true}, "tie_word_embeddings": true}}',
    ],
)
def test_untied_text_changes_words_alone(text: str) -> None:
    made = untied_text(text)
    assert json.loads(made) == untied(json.loads(text))
    assert made.replace("false", "true").startswith(text.rstrip()[:-1]), "what was there keeps its bytes"
    assert "vision_config" not in text or json.loads(made)["vision_config"] == {"tie_word_embeddings": True}


def plan(source: Path, *overrides: str) -> plans.Plan:
    text = f"model: {{source: '{source}'}}\noutput: out\nbackend: llmcompressor\nscheme: fp8_dynamic\nkv_cache: none\n"
    return plans.make_plan(recipes.parse(text, overrides=overrides), open_checkpoint(source))


@pytest.mark.parametrize("ignore", ["lm_head", "re:.*lm_head", "*lm_head", "language_model.lm_head"])
def test_the_head_is_a_module_tied_or_not(ignore: str, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s", config=TIED, shards=1)
    path = source / "model.safetensors"
    header, data = read_shard(path)
    begin, _ = header.pop("lm_head.weight")["data_offsets"]
    write_shard(path, header, data[:begin])
    made = plan(source, f"ignore=['{ignore}']")
    assert made.outputs.keys() == plan(source).outputs.keys()
    with pytest.raises(UsageError, match="lm_haed"):
        plan(source, "ignore=['re:.*lm_haed']")
