"""Recipes: every mistake is found at once, with its place and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.errors import UsageError
from pipeline.recipe import recipe
from tests.conftest import ROOT

GOOD = """\
model:
  source: Qwen/Qwen3-8B
output: out/x
backend: llmcompressor
scheme: fp8_dynamic
kv_cache: none
"""


def errors(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        recipe.parse(text, "r.yaml", overrides)
    return str(caught.value).splitlines()


def test_a_good_recipe_with_overrides() -> None:
    made = recipe.parse(GOOD, overrides=["shard_size=512MiB", "runtime.threads=3", "ignore=[lm_head, 're:.*o_proj']",
                                         "model.revision=v1.0", "model.source=a/b=c"])  # fmt: skip
    assert made.shard_bytes == 512 << 20
    assert made.runtime.threads == 3
    assert made.ignore == ["lm_head", "re:.*o_proj"]
    assert (made.model.source, made.model.revision) == ("a/b=c", "v1.0")
    assert isinstance(made, recipe.LLMCompressorRecipe)


def test_all_mistakes_at_once_in_the_order_of_their_places() -> None:
    text = """\
model:
  source: x/y
  revison: null
output: out
backend: llmcompressor
scheme: fp8
kv_cache: fp16
shard_size: 5 parsecs
output: other
calibration: {samples: -1, max_lenght: 3}
runtime: {device: tpu}
"""
    assert errors(text, "runtime.threads=many", "nope") == [
        "r.yaml:3:3: model.revison: unknown key; did you mean revision?",
        "r.yaml:6:1: scheme: 'fp8' is not one of its values; allowed: fp8_dynamic, none (fp8 belongs to "
        "backend: modelopt)",
        "r.yaml:7:1: kv_cache: 'fp16' is not one of its values; allowed: fp8, none",
        "r.yaml:8:1: shard_size: '5 parsecs' does not fit; a size is a number and a unit: B, KB, MB, GB, TB, KiB, "
        "MiB or GiB, e.g. 5GB",
        "r.yaml:9:1: output: this key is here twice; first at r.yaml:4:1",
        "r.yaml:10:15: calibration.samples: -1 is out of range; it should be greater than or equal to 1",
        "r.yaml:10:28: calibration.max_lenght: unknown key; did you mean max_length?",
        "r.yaml:11:11: runtime.device: 'tpu' is not one of its values; allowed: auto, cpu, cuda",
        "'nope' on the command line: an override is KEY=VALUE with a dotted key, e.g. calibration.samples=64",
        "'runtime.threads=many' on the command line: runtime.threads: 'many' does not fit; it should be a valid "
        "integer",
    ]


def test_a_wrong_backend_does_not_hide_other_mistakes() -> None:
    found = errors(GOOD.replace("llmcompressor", "llmcompresor") + "shard_sise: 1GB\n")
    assert [line.split(": ")[1] for line in found] == ["backend", "shard_sise"]
    assert "allowed: modelopt, llmcompressor" in found[0]
    assert "did you mean shard_size?" in found[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_cache": "fp8"}, ["calibration", "kv_cache: fp8"]),
        ({"scheme": "none"}, ["scheme", "nothing to do"]),
        ({"backend_options": {"exact": True}}, ["backend_options", "llmcompressor has none"]),
        ({"ignore": ["re:("]}, ["ignore", "no regular expression"]),
        ({"ignore": "lm_head"}, ["ignore", "list"]),
        ({"model": {"source": ""}}, ["model.source", "empty"]),
        ({"shard_size": "3B"}, ["shard_size", "smallest"]),
        ({"output": 3}, ["output", "string"]),
        ({"runtime": []}, ["runtime"]),
    ],
)
def test_values_that_do_not_fit(change: dict, words: list[str]) -> None:
    (line,) = errors(yaml.safe_dump({**yaml.safe_load(GOOD), **change}))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- a\n- b\n", "a mapping"),
        ("model: [\n", "this is not YAML"),
        ("a: &x 1\nb: *y\n", "this is not YAML"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("x: &a [1,1,1,1,1,1,1,1]\ny: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nz: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "u: &d [*c,*c,*c,*c,*c,*c,*c,*c]\nv: [*d,*d,*d,*d,*d,*d,*d,*d]\n", "more than"),
        ("\tmodel: x", "this is not YAML"),
        ("a\x00b: 1", "this is not YAML"),
    ],
)  # fmt: skip
def test_text_that_is_no_recipe(text: str, words: str) -> None:
    found = errors(text)
    assert len(found) == 1 and words in found[0] and found[0].startswith("r.yaml")


def test_numbers_are_numbers_and_words_are_words() -> None:
    text = GOOD + "calibration: {seed: 7}\nquality: {max_kl: 1e-3}\n"
    assert recipe.parse(text).quality.max_kl == 0.001
    (line,) = errors(GOOD + "calibration: {samples: '64'}\n")
    assert "calibration.samples" in line


@pytest.mark.parametrize(
    ("lines", "overrides", "words"),
    [
        (f"runtime: {{threads: {'9' * 5000}}}\n", (), "runtime.threads"),
        ("calibration: {seed: !!int abc}\n", (), "calibration.seed: this value cannot be read"),
        ("calibration: {seed: !!timestamp x}\n", (), "calibration.seed: this value cannot be read"),
        (f"shard_size: {'9' * 400}GB\n", (), "no disk is that large"),
        ("ignore: ['re:a{99999999999999999999}']\n", (), "no regular expression"),
        ("", ("output=/",), "must name a new directory"),
        ("", ("output=some/new/..",), "must name a new directory"),
        (f"serve: {{max_model_len: 1{'0' * 400}}}\n", (), "serve.max_model_len"),
        (f"serve: {{rope_scaling: {{factor: 4, original_max_position_embeddings: 1{'0' * 400}}}}}\n", (),
         "serve.rope_scaling.original_max_position_embeddings"),
        ("", ("ignore=&a [*a]",), "nested too deeply"),
        ("", ("model={source: x, source: y}",), "here twice"),
        ("", ("=x",), "an override is KEY=VALUE"),
        ("", ("model.source.x=1",), "holds a value"),
    ],
)  # fmt: skip
def test_values_that_break_naive_readers(lines: str, overrides: tuple, words: str) -> None:
    found = errors(GOOD + lines, *overrides)
    assert any(words in line for line in found), found


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"# " + b"x" * 10_000_000)
    cases = {tmp_path / "absent.yaml": "no such recipe", tmp_path: "a directory", big: "at most 1,048,576 bytes"}
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    cases[binary] = "not UTF-8"
    for path, words in cases.items():
        with pytest.raises(UsageError, match=words):
            recipe.load(path)


def test_every_recipe_in_the_repository_is_valid_and_opens_with_its_launch_line() -> None:
    paths = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(paths) >= 9
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    for path in paths:
        made = recipe.load(path)
        assert recipe.not_yet_built(made) == [], path
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
        lines = path.read_text().splitlines()
        assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
        assert f"recipes/{path.name}" in lines[2], path


def test_the_committed_schema_is_the_models() -> None:
    committed = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert committed == recipe.json_schema(), "run: quantize schema > recipes/recipe.schema.json"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(GOOD), "shard_sise": "1GB"}, committed)


def test_the_recipe_as_run_reads_back() -> None:
    made = recipe.parse(GOOD + "ignore: ['re:.*down_proj']\n")
    assert recipe.parse(recipe.recipe_yaml(made)) == made


def test_what_is_not_built_yet_is_refused_by_name() -> None:
    text = GOOD.replace("kv_cache: none", "kv_cache: fp8").replace("scheme: fp8_dynamic", "scheme: none")
    missing = recipe.not_yet_built(recipe.parse(text + "calibration: {}\nquality: {max_kl: 0.1}\n"))
    assert [line.split(":")[0] for line in missing] == ["scheme", "quality"]
    assert recipe.not_yet_built(recipe.parse(GOOD.replace("kv_cache: none", "calibration: {}"))) == []


def test_backend_options_are_a_backends_own() -> None:
    fp8 = GOOD.replace("llmcompressor", "modelopt").replace("fp8_dynamic", "fp8") + "calibration: {}\n"
    made = recipe.parse(fp8 + "backend_options: {exact: true}\n")
    assert made.backend == "modelopt" and made.backend_options.exact and made.backend_options.balance
    with pytest.raises(UsageError, match=r"backend_options.exakt: unknown key; did you mean exact?"):
        recipe.parse(fp8 + "backend_options: {exakt: true}\n")
    with pytest.raises(UsageError, match=r"backend_options.exact: unknown key; llmcompressor has none; leave it out"):
        recipe.parse(GOOD + "backend_options: {exact: true}\n")
    with pytest.raises(UsageError, match=r"runtime.device_memory: '16' does not fit; a size is a number and a unit"):
        recipe.parse(GOOD + "runtime: {device_memory: '16'}\n")
