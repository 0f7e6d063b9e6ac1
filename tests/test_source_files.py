"""Sources as people have them: pointers, links, adapters, leftovers, directories that are no checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.hub import resolve
from pipeline.checkpoint.source import DTYPES, INDEX, SourceError, open_checkpoint
from pipeline.plan import plan as plans
from pipeline.recipe import recipe as recipes
from pipeline.verify.structure import check_structure
from tests.conftest import assert_one_clear_line, make_plain_checkpoint, read_shard, write_shard

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 3980000000\n"
FIRST = "model-00001-of-00002.safetensors"


def plan(source: Path, *overrides: str) -> plans.Plan:
    text = f"model: {{source: '{source}'}}\noutput: out\nbackend: llmcompressor\nscheme: fp8_dynamic\nkv_cache: none\n"
    return plans.make_plan(recipes.parse(text, overrides=overrides), resolve(str(source), None))


def refusal(source: Path) -> str:
    with pytest.raises(SourceError) as raised:
        plan(source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- Git LFS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "preprocessor_config.json", "merges.txt",
                                  "chat_template.jinja", "config.json", INDEX, FIRST, "tokenization_x.py"])  # fmt: skip
def test_a_pointer_is_called_one(name: str, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    (source / name).write_text(POINTER)
    said = refusal(source)
    assert name in said and "Git LFS pointer" in said and f"git lfs pull in {source}" in said


def test_a_picture_may_be_a_pointer_and_is_left_out(tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    (source / "assets").mkdir()
    (source / "assets" / "demo.png").write_text(POINTER)
    made = plan(source).checkpoint
    assert "assets/demo.png" not in made.sidecars
    assert "git lfs pull" in dict(made.left_behind)["assets/demo.png"]


def test_verify_finds_pointers(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"pieces")
    assert quantize(write_recipe(source)).returncode == 0
    (tmp_path / "out" / "tokenizer.model").write_text(POINTER)
    found = check_structure(tmp_path / "out").findings
    assert [f.subject for f in found if f.code == "file-is-pointer"] == ["tokenizer.model"]


# --- links ---------------------------------------------------------------------------------------------


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["notes.json", "tokenizer_config.json", "config.json", "inner/notes.md"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_source_is_refused(name: str, relative: bool, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    secret = tmp_path / "secret"
    secret.write_bytes((source / "config.json").read_bytes())
    place = source / name
    link(place, os.path.relpath(secret, place.parent) if relative else secret)
    said = refusal(source)
    assert name in said and str(secret) in said and "out of the source" in said


def test_a_chain_of_links_is_followed_to_its_end(tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    (tmp_path / "secret").write_text("x")
    link(source / ".hidden", tmp_path / "secret")
    link(source / "notes.txt", ".hidden")
    assert "notes.txt" in refusal(source)


def test_links_within_the_source_and_into_a_caches_blobs_are_fine(tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    shutil.move(source / "tokenizer_config.json", source / "real.json")
    link(source / "tokenizer_config.json", "real.json")
    made = plan(source)
    assert {"real.json", "tokenizer_config.json"} <= set(made.checkpoint.sidecars)

    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / ("a" * 40)
    (cache / "blobs").mkdir(parents=True)
    for path in source.rglob("*"):
        shutil.copy(path, cache / "blobs" / f"{path.name}-hash")
        link(snapshot / path.name, f"../../blobs/{path.name}-hash")
    assert plan(snapshot).outputs.keys() == made.outputs.keys()
    moved = tmp_path / "moved"  # the repository's directory may be called otherwise
    shutil.copytree(cache, moved, symlinks=True)
    plan(moved / "snapshots" / ("a" * 40))
    old = tmp_path / "local_dir"  # as huggingface_hub filled one until 0.22
    for path in source.rglob("*"):
        link(old / path.name, cache / "blobs" / f"{path.name}-hash")
    plan(old)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", INDEX, FIRST])
def test_links_that_lead_nowhere_are_named(name: str, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    link(source / name, "../../blobs/gone")
    said = refusal(source)
    assert name in said and "leads nowhere" in said and "blobs/gone" in said and "cp -rL" in said


def test_other_links_are_left_out_by_name(tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    link(source / "demo.png", "gone.png")
    link(source / "loop", "loop")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.json").write_text("{}")
    link(source / "more", tmp_path / "elsewhere")
    made = plan(source).checkpoint
    noted = "\n".join(plan(source).warnings)
    assert all(name in noted for name in ("demo.png", "loop", "more"))
    left = dict(made.left_behind)
    assert "gone.png" in left["demo.png"] and "nowhere" in left["loop"] and "directory" in left["more"]
    assert not any(name.startswith("more") for name in made.sidecars)


# --- adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_adapter_files_beside_a_model_are_left_out_by_name(shards: int, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s", shards=shards)
    plain = plan(source)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(next(source.glob("*.safetensors")), source / "adapter_model.safetensors")
    made = plan(source)
    assert made.outputs == plain.outputs and made.checkpoint.sidecars == plain.checkpoint.sidecars
    (note,) = [warning for warning in made.warnings if "LoRA" in warning]
    assert "adapter_config.json, adapter_model.safetensors: of a LoRA adapter, which is not applied" in note
    for path in [*source.glob("model*"), source / "config.json"]:
        path.unlink()
    assert "merge it" in refusal(source)


# --- sections that are left over, weights that are quantized in part -----------------------------------


LEFTOVER: dict[str, dict[str, Any]] = {
    "quantization_config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "text_config.quantization_config": {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    "compression_config": {"compression_config": {"quant_method": "compressed-tensors"}},
}


@pytest.mark.parametrize("place", list(LEFTOVER))
def test_a_section_without_quantized_tensors_is_a_leftover(place: str, tmp_path: Path) -> None:
    source = make_plain_checkpoint(
        tmp_path / "s", config=LEFTOVER[place], extra={"model.layers.0.self_attn.position_ids": (1, 8)}
    )
    said = refusal(source)
    assert "no tensor here is quantized" in said and f"remove {place} from config.json" in said


def with_dtype(source: Path, name: str, dtype: str, shape: list[int]) -> Path:
    """Another tensor in a checkpoint of one shard, with as many bytes as it needs."""
    path = source / "model.safetensors"
    header, data = read_shard(path)
    if name in header:  # its bytes stay, under another name
        header[f"{name}_before"] = header.pop(name)
    count = DTYPES[dtype][0]
    for n in shape:
        count *= n
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + count]}
    write_shard(path, header, data + b"\x01" * count)
    return source


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "visual.blocks.0.qkv.weight", "model.layers.0.self_attn.other", "model.embed_in.weight"]
)
def test_fp8_in_a_plain_source_is_refused_by_name(name: str, tmp_path: Path) -> None:
    source = with_dtype(make_plain_checkpoint(tmp_path / "s", shards=1), name, "F8_E4M3", [128, 64])
    said = refusal(source)
    assert said.startswith(name) and "F8_E4M3" in said and "original" in said and "report" not in said


@pytest.mark.parametrize("dtype", sorted(DTYPES.keys() - {"F8_E4M3"}))
def test_a_buffer_of_any_dtype_is_planned_and_can_be_read(dtype: str, tmp_path: Path) -> None:
    """What a plan takes, the reader of layers has a torch dtype for."""
    import torch

    from pipeline.stream.layer_reader import LayerReader

    name = "model.layers.1.self_attn.counter"
    source = with_dtype(make_plain_checkpoint(tmp_path / "s", shards=1), name, dtype, [3])
    made = plan(source)
    assert made.actions[name].action == "copy" and made.outputs[name].dtype == dtype

    class Layer:
        tensors = (made.checkpoint.tensors[name],)
        nbytes = tensors[0].nbytes

    with LayerReader(made.checkpoint, [Layer()], torch.device("cpu")) as reader:
        (raw,) = reader
        assert raw.tensors[name].dtype == getattr(torch, DTYPES[dtype][1]) and raw.tensors[name].shape == (3,)


# --- directories that are something else ---------------------------------------------------------------


def gguf(root: Path) -> None:
    (root / "m-Q8_0.gguf").write_bytes(b"GGUF")


def cache_root(root: Path) -> None:
    make_plain_checkpoint(root / "snapshots" / "abc")
    make_plain_checkpoint(root / "snapshots" / "def")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("def")


def whole_cache(root: Path) -> None:
    cache_root(root / "hub" / "models--org--name")


def inner(root: Path) -> None:
    make_plain_checkpoint(root / "model")


def diffusers(root: Path) -> None:
    (root / "model_index.json").write_text("{}")


ELSE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a GGUF folder": (gguf, "m-Q8_0.gguf.*name the original checkpoint"),
    "a hub cache's repository": (cache_root, "snapshots/.*2 are there.*/snapshots/def$"),
    "a hub cache": (whole_cache, "hub id, or one snapshot: .*/hub/models--org--name/snapshots/def$"),
    "a directory above": (inner, "in model/; name .*/model$"),
    "a pipeline": (diffusers, "diffusers"),
    "nothing": (lambda root: None, "there is no config.json"),
}


@pytest.mark.parametrize("what", list(ELSE))
def test_a_directory_that_is_something_else(what: str, tmp_path: Path) -> None:
    make, pattern = ELSE[what]
    root = tmp_path / "d"
    root.mkdir()
    make(root)
    assert re.search(pattern, refusal(root)), refusal(root)
    (problem,) = check_structure(root).problems
    assert re.search(pattern, problem) and "model.source" not in problem


def test_verify_names_what_it_was_given(tmp_path: Path, quantize: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    for given, words in (
        ("org/name-FP8", "hf download org/name-FP8"),
        (source / FIRST, f"name the directory that it lies in: {source}"),
        (tmp_path / "absent", "no such directory"),
    ):
        (problem,) = check_structure(Path(given)).problems
        assert words in problem and "model.source" not in problem
    done = quantize("verify", source, "--source", "no slash", "--level", "structure")
    assert_one_clear_line(done, 2, "--source", "no hub id")
    assert "model.source" not in done.stderr


def test_a_stale_index(tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s", shards=1)
    names = list(open_checkpoint(source).tensors)
    index = {"weight_map": {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}}
    (source / INDEX).write_text(json.dumps(index))
    said = refusal(source)
    assert "stale" in said and f"remove {INDEX}" in said and "complete the download" not in said
    index["weight_map"]["model.layers.2.mlp.up_proj.weight"] = FIRST
    (source / INDEX).write_text(json.dumps(index))
    said = refusal(source)
    assert "does not hold model.layers.2.mlp.up_proj.weight" in said and "complete the download" not in said
