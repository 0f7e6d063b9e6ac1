"""Sources, recipes and outputs that cannot be worked with: one clear line, the right exit status, nothing published."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.source import SourceError, parse_header
from tests.conftest import assert_one_clear_line, make_plain_checkpoint, put_value, read_shard, write_shard

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[Any], None]) -> None:
    header, data = read_shard(path)
    change(header)
    write_shard(path, header, data)


def truncate(source: Path) -> None:
    path = source / SECOND
    os.truncate(path, path.stat().st_size - 1000)


def truncate_into_the_header(source: Path) -> None:
    os.truncate(source / SECOND, 100)


def corrupt_header(source: Path) -> None:
    raw = bytearray((source / FIRST).read_bytes())
    raw[20:40] = b"\x80" * 20
    (source / FIRST).write_bytes(raw)


def huge_header(source: Path) -> None:
    raw = bytearray((source / FIRST).read_bytes())
    raw[:8] = struct.pack("<Q", 1 << 62)
    (source / FIRST).write_bytes(raw)


def overlapping(source: Path) -> None:
    def change(header: Any) -> None:
        name = next(name for name in header if name != "__metadata__")
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + 2, end + 2]

    edit_header(source / FIRST, change)


def wrong_shape(source: Path) -> None:
    def change(header: Any) -> None:
        header["model.embed_tokens.weight"]["shape"][0] += 1

    edit_header(source / FIRST, change)


def bad_dtype(source: Path) -> None:
    def change(header: Any) -> None:
        header["model.embed_tokens.weight"]["dtype"] = "BF8"

    edit_header(source / FIRST, change)


def listed_dtype(source: Path) -> None:
    def change(header: Any) -> None:
        header["model.embed_tokens.weight"]["dtype"] = ["BF16"]

    edit_header(source / FIRST, change)


def integer_weight(source: Path) -> None:
    def change(header: Any) -> None:
        header["model.layers.0.self_attn.q_proj.weight"]["dtype"] = "I16"

    edit_header(source / FIRST, change)


def index_elsewhere(source: Path) -> None:
    edit_json(source / INDEX, lambda v: v["weight_map"].update({"lm_head.weight": "../secret.safetensors"}))


def index_absolute(source: Path) -> None:
    edit_json(source / INDEX, lambda v: v["weight_map"].update({"lm_head.weight": "/etc/passwd"}))


def index_names_a_missing_file(source: Path) -> None:
    edit_json(source / INDEX, lambda v: v["weight_map"].update({"lm_head.weight": "model-00003.safetensors"}))


def index_promises_more(source: Path) -> None:
    edit_json(source / INDEX, lambda v: v["weight_map"].update({"extra.weight": FIRST}))


def index_promises_less(source: Path) -> None:
    edit_json(source / INDEX, lambda v: v["weight_map"].pop("lm_head.weight"))


def index_is_not_json(source: Path) -> None:
    (source / INDEX).write_text("{")


def quantized_already(source: Path) -> None:
    def halve(header: Any) -> None:  # as many bytes, in FP8
        entry = header["model.layers.0.self_attn.q_proj.weight"]
        entry.update(dtype="F8_E4M3", shape=[entry["shape"][0], 2 * entry["shape"][1]])

    edit_header(source / FIRST, halve)
    edit_json(source / "config.json", lambda v: v.update(quantization_config={"quant_method": "fp8"}))


def fewer_layers_than_config(source: Path) -> None:
    edit_json(source / "config.json", lambda v: v.update(num_hidden_layers=9))


def another_width(source: Path) -> None:
    edit_json(source / "config.json", lambda v: v.update(hidden_size=48))


def a_layer_without_up_proj(source: Path) -> None:
    def rename(header: Any) -> None:
        header["model.layers.1.mlp.odd"] = header.pop("model.layers.1.mlp.up_proj.weight")

    edit_header(source / SECOND, rename)
    edit_json(source / INDEX, lambda v: v["weight_map"].update({"model.layers.1.mlp.odd": SECOND}))
    edit_json(source / INDEX, lambda v: v["weight_map"].pop("model.layers.1.mlp.up_proj.weight"))


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (truncate, (SECOND, "truncated", "fetch it again")),
    "truncated into the header": (truncate_into_the_header, (SECOND, "damaged or truncated")),
    "corrupt header": (corrupt_header, (FIRST, "header is damaged")),
    "a header of 4 EiB": (huge_header, (FIRST, "damaged or truncated")),
    "overlapping tensors": (overlapping, (FIRST, "header is damaged")),
    "shape against bytes": (wrong_shape, (FIRST, "model.embed_tokens.weight", "header is damaged")),
    "unknown dtype": (bad_dtype, (FIRST, "BF8")),
    "a dtype that is a list": (listed_dtype, (FIRST, "header is damaged")),
    "integer weight": (integer_weight, ("q_proj.weight", "I16", "use the original")),
    "zero-size shard": (lambda s: os.truncate(s / FIRST, 0), (FIRST, "0 bytes")),
    "zero-size config": (lambda s: os.truncate(s / "config.json", 0), ("config.json", "not JSON")),
    "index leads out": (index_elsewhere, (INDEX, "../secret.safetensors", "do not trust")),
    "index with an absolute path": (index_absolute, (INDEX, "/etc/passwd", "do not trust")),
    "index names a missing file": (index_names_a_missing_file, ("model-00003.safetensors", "complete the download")),
    "index promises more": (index_promises_more, (FIRST, "extra.weight")),
    "index promises less": (index_promises_less, (SECOND, "lm_head.weight", "not in the index")),
    "index is no JSON": (index_is_not_json, (INDEX, "not JSON")),
    "no index": (lambda s: (s / INDEX).unlink(), ("2 shards", "fetch the index")),
    "no config": (lambda s: (s / "config.json").unlink(), ("no config.json",)),
    "consolidated beside the index": (
        lambda s: (s / "consolidated.safetensors").write_bytes((s / FIRST).read_bytes()),
        ("consolidated.safetensors", "Mistral", "move it away"),
    ),
    "an extra shard": (
        lambda s: (s / "model-00003-of-00003.safetensors").write_bytes((s / FIRST).read_bytes()),
        ("model-00003-of-00003.safetensors", "not in"),
    ),
    "quantized already": (quantized_already, ("quantized already (fp8)", "BF16 original")),
    "fewer layers than the config says": (fewer_layers_than_config, ("model.layers has no layer 2",)),
    "no stack of this width": (another_width, ("no language model found", "width 48")),
    "a layer without up_proj": (a_layer_without_up_proj, ("model.layers.1 has no mlp.up_proj.weight", "incomplete")),
    "NaN in a weight": (
        lambda s: put_value(s, "model.layers.1.mlp.down_proj.weight", 0x7FC0),
        ("model.layers.1.mlp.down_proj.weight", "NaN or Inf in row 0"),
    ),
    "Inf in a weight": (
        lambda s: put_value(s, "model.layers.0.self_attn.k_proj.weight", 0xFF80),
        ("model.layers.0.self_attn.k_proj.weight", "NaN or Inf in row 0"),
    ),
    "NaN in a norm": (lambda s: put_value(s, "model.norm.weight", 0x7FC0), ("model.norm.weight", "NaN or Inf")),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_sources(name: str, quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    damage, words = DAMAGE[name]
    damage(source)
    done = quantize(write_recipe(source))
    assert_one_clear_line(done, 1, *words)
    assert not (tmp_path / "out").exists()


def test_only_pickles(quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert_one_clear_line(quantize(write_recipe(source)), 1, "pickle", "save_pretrained")


def test_no_such_source(quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    assert_one_clear_line(quantize(write_recipe(tmp_path / "absent")), 1, "no such directory")
    assert_one_clear_line(quantize(write_recipe("no slash")), 2, "model.source", "no hub id")


def test_output_inside_the_source(quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    before = sorted(source.iterdir())
    for output in (source, source / "fp8", tmp_path):
        assert_one_clear_line(quantize(write_recipe(source, output)), 2, "never written to")
    assert sorted(source.iterdir()) == before


def test_output_that_is_not_ours(quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for options in ((), ("--fresh",)):
        assert_one_clear_line(quantize(write_recipe(source), *options), 2, "no result of this program")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_partial_that_is_not_ours(quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    assert_one_clear_line(quantize(write_recipe(source)), 2, "notes.txt", "no journal of this tool")


def test_a_recipe_of_ten_megabytes(quantize: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: {source: x}\n" + b"# padding\n" * 1_000_000)
    assert_one_clear_line(quantize(path), 2, "a recipe is at most")


def test_a_fixed_source_goes_on(quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    """NaN stops a run; with the NaN gone the file is another one, so the run starts over when asked to."""
    source = make_plain_checkpoint(tmp_path / "source")
    recipe = write_recipe(source)
    put_value(source, "model.norm.weight", 0x7FC0)
    assert_one_clear_line(quantize(recipe), 1, "NaN or Inf")
    put_value(source, "model.norm.weight", 0x3F80)
    refused = quantize(recipe)
    assert refused.returncode == 2
    assert f"source: {SECOND}: its weights changed" in refused.stderr and "--fresh" in refused.stderr
    done = quantize(recipe, "--fresh")
    assert done.returncode == 0, done.stderr


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_headers_of_any_shape_are_refused_or_read(data: st.DataObject) -> None:
    """No header, however wrong, ends in anything but tensors or a SourceError."""
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("BF16"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    )
    entry = st.fixed_dictionaries({"dtype": value, "shape": value, "data_offsets": value})
    header = data.draw(st.dictionaries(st.text(max_size=6), entry | value, max_size=3) | value)
    raw = json.dumps(header).encode()
    raw = data.draw(st.just(raw) | st.binary(max_size=20))
    try:
        parse_header(raw, "x.safetensors", len(raw) + 8, 0)
    except SourceError as error:
        assert str(error).startswith("x.safetensors")


def test_infinity_in_a_buffer_is_no_damage(quantize: Any, write_recipe: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source", extra={"visual.causal_mask": (4, 4)})
    put_value(source, "visual.causal_mask", 0xFF80)
    assert quantize(write_recipe(source)).returncode == 0
