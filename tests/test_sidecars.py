"""config.json changes by its section alone; the card says what was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.sidecars import config_with
from pipeline.checkpoint.source import SourceError
from tests.conftest import all_tensors, make_plain_checkpoint
from tests.damage import tie_head

SECTION = {"quant_method": "compressed-tensors", "ignore": ["a"], "nested": {"x": None}}


@pytest.mark.parametrize("text", ["{}", "{ }\n", '{"a": 1e-06}', '{\n  "a": {"b": [1]}\n}\n\n', '{"é": "ü"}'])
def test_only_the_section_is_added(text: str) -> None:
    made = config_with(text, SECTION)
    assert json.loads(made) == {**json.loads(text), "quantization_config": SECTION}
    head = text.rstrip()[:-1].rstrip()
    assert made.startswith(head), "what was there keeps its bytes"
    assert made[len(made.rstrip()) :] == text[len(text.rstrip()) :]


@given(st.dictionaries(st.text(max_size=8), st.recursive(st.integers() | st.text(max_size=5) | st.none(), st.lists)),
       st.sampled_from([None, 1, 4]))  # fmt: skip
def test_any_config(config: dict[str, Any], indent: int | None) -> None:
    config.pop("quantization_config", None)
    made = config_with(json.dumps(config, indent=indent), SECTION)
    assert json.loads(made) == {**config, "quantization_config": SECTION}


@pytest.mark.parametrize("empty", ["null", "{}"])
def test_an_empty_section_is_replaced(empty: str, tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source", config={"quantization_config": json.loads(empty)})
    done = quantize(write_recipe(source))
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made.pop("quantization_config")["quant_method"] == "compressed-tensors"
    before = json.loads((source / "config.json").read_text())
    del before["quantization_config"]
    assert made == before


def test_a_second_section_is_refused() -> None:
    with pytest.raises(SourceError):
        config_with('{"quantization_config": {"quant_method": "fp8"}}', SECTION)


def test_the_card_is_for_others_to_read(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(
        tmp_path / "base-model", config={"vision_config": {}}, extra={"visual.proj.weight": (64, 64)}
    )
    assert quantize(write_recipe(source), "ignore=['re:.*down_proj']").returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card, "a path of this machine"
    _, metadata, body = card.split("---\n", 2)
    told = yaml.safe_load(metadata)
    assert "base_model_relation" not in told and told["pipeline_tag"] == "image-text-to-text"
    assert {"fp8", "compressed-tensors"} <= set(told["tags"])
    for words in ("scheme: fp8_dynamic", "re:.*down_proj", "vllm serve out", "no KV-cache scales", "`base-model`"):
        assert words in body, words


@pytest.mark.parametrize(
    ("config", "dropped"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_a_tied_head_is_dropped_and_an_untied_one_kept(
    config: dict, dropped: bool, tmp_path: Path, quantize: Any, write_recipe: Any
) -> None:
    source = tie_head(make_plain_checkpoint(tmp_path / "source", config=config))
    done = quantize(write_recipe(source))
    assert done.returncode == 0, done.stderr
    assert ("lm_head.weight" not in all_tensors(tmp_path / "out")) == dropped
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignore, "tied or not, the module is there"
