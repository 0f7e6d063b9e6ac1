"""What a recipe's mistakes are answered with: the line to write instead, and where paths are taken from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.calibration.captions import read_source
from pipeline.checkpoint import hub
from pipeline.errors import PipelineError, UsageError
from pipeline.recipe import recipe
from pipeline.vllm_env.environment import find

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


@pytest.mark.parametrize(
    ("change", "end"),
    [
        ({"shard_size": 5}, "shard_size: 5 does not fit; a size needs its unit: write 5GB"),
        ({"shard_size": 500_000_000}, "write 0.5GB"),
        ({"shard_size": 12_345_678}, "write 12345678B"),
        ({"serve": {"gpu_memory": 80}}, "a size needs its unit: write 80GB"),
        ({"serve": {"gpu_memory": 79.5}}, "write 79.5GB"),
        ({"runtime": {"device_memory": 16}}, "write 16GB"),
        ({"runtime": {"device_memory": "24"}}, "e.g. 24GB"),
        ({"model": "/models/x"}, "write model: {source: /models/x}"),
        ({"model": "source:x"}, "a space belongs after the colon: write source: x"),
        ({"model": None}, "nothing stands below it: indent its keys, or leave it out"),
        ({"calibration": "captions.json"}, "write calibration: {captions: captions.json}"),
        ({"calibration": 512}, "write calibration: {samples: 512}"),
        ({"runtime": "cuda"}, "write runtime: {device: cuda}"),
        ({"serve": "80GB"}, "write serve: {gpu_memory: 80GB}"),
        ({"quality": "high"}, "it is a section, with the keys max_kl, max_perplexity_ratio, min_top1"),
        ({"ignore": "lm_head"}, "write ignore: [lm_head]"),
        ({"ignore": "lm_head, *visual*"}, "write ignore: [lm_head, '*visual*']"),
        ({"ignore": "re:a{1,2}"}, "write ignore: ['re:a{1,2}']"),
        ({"ignore": None}, "write ignore: []"),
        ({"ignore": [3]}, "write '3'"),
        ({"output": 2024}, "write output: '2024'"),
        ({"output": True}, "a word that YAML reads as true or false needs quotes"),
        ({"output": None}, "nothing stands after the colon"),
        ({"calibration": {"samples": "4,096"}}, "write samples: 4096"),
        ({"calibration": {"samples": 1e3}}, "write samples: 1000"),
        ({"serve": {"gpu_memory_utilization": 90}}, "write gpu_memory_utilization: 0.9"),
        ({"serve": {"gpu_memory_utilization": "90%"}}, "write gpu_memory_utilization: 0.9"),
        ({"serve": {"extra": "port=1"}}, "for example extra: {port: 8001, enable-prefix-caching: true}"),
        ({"source": "x"}, "did you mean model.source?"),
        ({"runtime": {"samples": 3}}, "did you mean calibration.samples?"),
        ({"serve": {"ignore": []}}, "did you mean ignore?"),
        ({"calibration": {"samples:20": None}}, "a space belongs after the colon: write samples: 20"),
    ],
)
def test_a_value_of_the_wrong_kind_is_answered_with_the_right_one(change: dict, end: str) -> None:
    (line,) = errors(yaml.safe_dump({**yaml.safe_load(GOOD), **change}))
    assert line.endswith(end)


@pytest.mark.parametrize(
    ("override", "end"),
    [
        ("ignore=lm_head", "write 'ignore=[lm_head]'"),
        ("model=/models/x", "write model.source=/models/x"),
        ("shard_size=5", "e.g. 5GB"),
        ("calibration.samples=4,096", "write calibration.samples=4096"),
        ("ignore=*visual*", "write \"ignore=['*visual*']\""),
    ],
)
def test_on_the_command_line_the_answer_is_an_override(override: str, end: str) -> None:
    (line,) = errors(GOOD, override)
    assert line.startswith(f"{override!r} on the command line") and line.endswith(end)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("model:\n\tsource: x\n", "indent with spaces: YAML takes no tab there"),
        ("model:\n  source: x\n   revision: y\n", "keys of one section begin in the same column"),
        ("model:\n    source: x\n  revision: y\n", "keys of one section begin in the same column"),
        (" model:\n  source: x\noutput: z\n", "keys of one section begin in the same column"),
        ("model:\n  source: x\n- a\n", "keys of one section begin in the same column"),
        ("output:x\nmodel:\n  source: x\n", "a space belongs after the colon: output: x"),
        ("model:\n  source: x\noutput:x\n", "a space belongs after the colon: output: x"),
        ("model:\n  source:x\n  revision: z\n", "a space belongs after the colon: source: x"),
        ("ignore:\n- a\n-b\nx: y\n", "a space belongs after the dash: - b"),
        ("output = x\nmodel: y\n", "line 1 is not KEY: VALUE"),
        ("output: @x\n", "a text that begins with @ needs quotes"),
        ("output: `x`\n", "a text that begins with ` needs quotes"),
        ("output: %x\n", "a text that begins with % needs quotes"),
        ("ignore: [*.down_proj]\n", "a text that begins with * or & needs quotes"),
        ("ignore: [*visual]\n", "a text that begins with * or & needs quotes"),
        ("output: a: b\n", "a text that holds a colon and a space needs quotes"),
        ("output: 'a' b\n", "a text that holds quotes needs quotes"),
        ("output: |x\n", "a text that begins with | or > needs quotes"),
        ('output: "C:\\data"\n', "write it in single quotes"),
        ("output: 'abc\nx: y\n", "a quote is not closed"),
        ("ignore: [re:.*[0-5].*]\n", "a bracket or brace is not closed, or a text within it needs quotes"),
        ("a: b\n---\nc: d\n", "it is one document: remove the line ---"),
        ("a\x00b: 1", "save it as plain text in UTF-8"),
    ],
)
def test_what_yaml_says_has_a_hint(text: str, hint: str) -> None:
    (line,) = errors(text)
    assert "this is not YAML" in line and f"; {hint}" in line


def test_text_that_yaml_takes_for_something_else() -> None:
    assert errors(GOOD.replace("out/x", "!x"))[-1].endswith("a text that begins with ! needs quotes")
    assert any(line.endswith("braces or brackets needs quotes") for line in errors(GOOD.replace("out/x", "{{ x }}")))


# --- the shell's words -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["/data/run #3", "#3", "/a: b", "2024", "1e3", "yes", "[x]", "{x}", "@x", "*x", "&x", "!x", "- x", "a,b", "a 'b' c",
     "'a' b", "%x", "`x`", "a  b", "|", "it's", "x:"],
)  # fmt: skip
def test_text_on_the_command_line_is_taken_whole(value: str) -> None:
    made = recipe.parse(GOOD, overrides=[f"output={value}", f"model.source={value}", f"runtime.vllm_python={value}"])
    assert (made.output, made.model.source, made.runtime.vllm_python) == (value, value, value)


def test_other_values_on_the_command_line_are_yaml_without_comments() -> None:
    made = recipe.parse(GOOD, overrides=["ignore=['a #1', b]", "runtime.threads=3", "runtime.work_directory=null",
                                         "model.revision='\"1 #2\"'", "serve.extra.chat-template=/x #3",
                                         "model.revision='1'", "serve.extra.port=8001"])  # fmt: skip
    assert (made.ignore, made.runtime.threads, made.runtime.work_directory) == (["a #1", "b"], 3, None)
    assert made.model.revision == "1" and made.serve.extra == {"chat-template": "/x #3", "port": 8001}
    for override in ("runtime.threads=3 # half", "ignore=[a] # and more", "shard_size=5GB #", "scheme=fp8_dynamic #"):
        (line,) = errors(GOOD, override)
        assert line.startswith(f"{override!r} on the command line"), override


# --- variables ---------------------------------------------------------------------------------------


def test_variables_in_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("RUN_2", "a $b")
    text = GOOD.replace("out/x", "${SCRATCH}/$RUN_2/x$$y$5").replace("Qwen/Qwen3-8B", "$SCRATCH/m")
    text += "runtime: {work_directory: $SCRATCH/t, vllm_python: $SCRATCH/p}\ncalibration: {captions: $SCRATCH/c.txt}\n"
    made = recipe.parse(text)
    assert made.output == "/scratch/me/a $b/x$y$5" and made.model.source == "/scratch/me/m"
    assert (made.runtime.work_directory, made.runtime.vllm_python) == ("/scratch/me/t", "/scratch/me/p")
    assert made.calibration is not None and made.calibration.captions == "/scratch/me/c.txt"
    assert recipe.parse(recipe.recipe_yaml(made)) == made, "a dollar sign is written so that it is read back"
    assert recipe.parse(GOOD, overrides=["output=$SCRATCH/o"]).output == "/scratch/me/o"
    assert recipe.parse(GOOD, overrides=["output=~/o"]).output == "~/o"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$NOT_SET/out", "the environment variable NOT_SET is not set"),
        ("${NOT_SET}/out", "the environment variable NOT_SET is not set"),
        ("$EMPTY/out", "the environment variable EMPTY is empty"),
        ("${NOT_SET:-/tmp}/out", "a variable is written $NAME or ${NAME}"),
        ("${NOT_SET/out", "a variable is written $NAME or ${NAME}"),
        ("${}/out", "a variable is written $NAME or ${NAME}"),
    ],
)
def test_variables_that_are_not_set_are_refused_by_name(path: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    for key in ("output", "model.source", "runtime.work_directory", "runtime.vllm_python", "calibration.captions"):
        (line,) = errors(GOOD, f"{key}={path}")
        assert f"{key}: " in line and words in line


# --- where paths are taken from -----------------------------------------------------------------------


def test_a_path_that_leads_nowhere_says_from_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = f"in {tmp_path}, the working directory"
    with pytest.raises(PipelineError, match=f"x: no such directory {here}"):
        hub.resolve("./x", None)
    with pytest.raises(PipelineError, match=f"'a/b/c' is no directory {here}, and no hub id"):
        hub.resolve("a/b/c", None)
    with pytest.raises(PipelineError, match="/a/b: no such directory; name a directory with a checkpoint, or a hub id"):
        hub.resolve("/a/b", None)
    with pytest.raises(UsageError, match=f"x.txt: no such file {here}"):
        read_source("x.txt")
    with pytest.raises(UsageError, match=f"'x' is no file or directory {here}"):
        read_source("x")
    with pytest.raises(UsageError, match=f"bin/python is no Python that can be run {here}"):
        find("bin/python")


def test_what_looks_like_a_path_is_not_sent_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def from_hub(name: str, revision: str | None, headers_only: bool, whole: bool) -> None:
        asked.append(name)

    monkeypatch.setattr(hub, "_from_hub", from_hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, why in (("models/qwen", "models/ is what directories are called"), ("mine/x", "mine is a directory")):
        with pytest.raises(PipelineError, match=f"{name}: no such directory in {tmp_path}, .*; {why}.* hub"):
            hub.resolve(name, None)
    with pytest.raises(UsageError, match=r"'mine/c' is no file or directory .*mine is a directory here"):
        read_source("mine/c")
    assert not asked
    hub.resolve("mine/x", "main")
    hub.resolve("Qwen/Qwen3-8B", None)
    assert asked == ["mine/x", "Qwen/Qwen3-8B"]
