"""Whose work it is: what differs between two runs is said by recipe keys, and a copied source is the same source."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline import identity as identities
from pipeline.checkpoint import hub
from pipeline.checkpoint.result import JOURNAL
from pipeline.cli import main
from pipeline.errors import OtherRun
from pipeline.events import read_events
from pipeline.identity import Identity, Recorded, compare
from pipeline.journal import read_identity, read_record
from pipeline.plan import layout
from pipeline.plan.identity import _sample
from pipeline.plan.plan import make_plan
from pipeline.recipe.recipe import load
from tests.conftest import CALIBRATED, SENTENCES, all_tensors, make_plain_checkpoint, read_shard
from tests.stopping import run, stopped

FIRST = "model-00001-of-00002.safetensors"
QUANTIZED, COPIED, LAST = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
MOVED = "the source was moved, copied or touched"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of many units."""
    monkeypatch.setattr(layout, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(layout, "PIECE_BYTES", 3_000)
    return make_plain_checkpoint(tmp_path / "source", layers=4)


@pytest.fixture
def recipe(source: Path, write_recipe: Any) -> Path:
    made: Path = write_recipe(source)
    return made


def stop(recipe: Path, *overrides: str, after: int = 4, **options: bool) -> int:
    """`stopped`, in the middle of a source's units."""
    return stopped(recipe, *overrides, after=after, **options)


def flip(source: Path, tensor: str, keep_time: bool = False) -> Path:
    """Change the lowest bit in the middle of a tensor, in place; returns its shard."""
    for path in source.glob("*.safetensors"):
        header, data = read_shard(path)
        if tensor in header:
            begin, end = header[tensor]["data_offsets"]
            status, raw = path.stat(), bytearray(path.read_bytes())
            raw[len(raw) - len(data) + (begin + end) // 4 * 2] ^= 1
            with path.open("r+b") as file:
                file.write(raw)
            if keep_time:
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            return path
    raise AssertionError(tensor)


def touch(source: Path) -> Path:
    for path in source.rglob("*"):
        os.utime(path, ns=(1, 1))
    return source


def copy(source: Path) -> Path:
    """Another directory, with other times and inodes; the first one is gone."""
    target = source.with_name("elsewhere") / "copy"
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    shutil.rmtree(source)
    return target


def move(source: Path) -> Path:
    return source.rename(source.with_name("renamed"))


def finished_when_begun(output: Path) -> list[int]:
    return [event["done"] for event in read_events(output / "quantize" / "events.jsonl") if event["event"] == "run"]


# --- the same source ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [touch, copy, move])
def test_a_stopped_run_goes_on_with_a_source_that_holds_the_same_bytes(
    change: Callable[[Path], Path], source: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(recipe, f"output={tmp_path / 'whole'}")
    done = stop(recipe)
    place = change(source)
    capsys.readouterr()
    again = stop(recipe, f"model.source={place}", after=2)
    assert (MOVED in capsys.readouterr().out) == (change is not move), "a renamed directory's files are known by inode"
    run(recipe, f"model.source={place}")
    assert MOVED not in capsys.readouterr().out, "the journal knows the new place"
    assert finished_when_begun(tmp_path / "out") == [0, done, done + again]
    assert all_tensors(tmp_path / "out") == all_tensors(tmp_path / "whole")


@pytest.mark.parametrize("change", [touch, copy, move])
def test_a_result_of_a_source_that_holds_the_same_bytes_is_done_already(
    change: Callable[[Path], Path], source: Path, recipe: Path, tmp_path: Path
) -> None:
    run(recipe)
    card = {tmp_path / "out/README.md", tmp_path / "out/quantize/events.jsonl"}  # it names the source's directory

    def files() -> dict[Path, bytes]:
        found = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
        return {path: path.read_bytes() for path in found - (set() if change is touch else card)}

    before = files()
    place = change(source)
    assert run(recipe, f"model.source={place}").already
    assert files() == before


def test_an_unchanged_source_is_not_read_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.moved._first_changed", lambda *_: pytest.fail("it was read"))
    stop(recipe)
    run(recipe)
    assert run(recipe).already and MOVED not in capsys.readouterr().out


# --- another source ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [QUANTIZED, COPIED])
@pytest.mark.parametrize("keep_time", [False, True])
def test_one_bit_of_what_was_read_is_noticed(
    tensor: str, keep_time: bool, source: Path, recipe: Path, tmp_path: Path
) -> None:
    """Also one that quantization rounds away: the same file, the same size, even the same mtime."""
    done = stop(recipe, after=8)
    shard = flip(source, tensor, keep_time)
    with pytest.raises(OtherRun, match=f"{shard.name}: the bytes of {tensor} changed") as caught:
        run(recipe)
    assert "put the source back as it was" in str(caught.value) and "--fresh" in str(caught.value)
    assert [each["file"] for each in caught.value.differences] == [shard.name]
    flip(source, tensor, keep_time)  # put back
    run(recipe)
    assert finished_when_begun(tmp_path / "out") == [0, done]
    flip(source, tensor, keep_time)
    with pytest.raises(OtherRun, match=f"{shard.name}: the bytes of {tensor} changed"):
        run(recipe)
    assert not run(recipe, fresh=True).already


def test_a_fixed_copy_elsewhere_is_not_taken_for_the_source(source: Path, recipe: Path) -> None:
    run(recipe)
    place = copy(source)
    flip(place, QUANTIZED)
    with pytest.raises(OtherRun, match=f"the bytes of {QUANTIZED} changed"):
        run(recipe, f"model.source={place}")


def test_what_was_not_read_yet_is_read_as_it_is_now(source: Path, recipe: Path, tmp_path: Path) -> None:
    """The result is the one that a run of the changed source alone gives: no mixture."""
    done = stop(recipe, after=2)
    flip(source, LAST)
    run(recipe)
    assert finished_when_begun(tmp_path / "out") == [0, done]
    run(recipe, f"output={tmp_path / 'alone'}")
    assert all_tensors(tmp_path / "out") == all_tensors(tmp_path / "alone")
    assert run(recipe).already


def test_other_files_of_the_source_are_named(source: Path, recipe: Path) -> None:
    run(recipe)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(OtherRun) as caught:
        run(recipe)
    lines = str(caught.value).splitlines()
    assert "  source: chat_template.jinja: it was not there then" in lines
    assert "  source: tokenizer_config.json: its contents changed" in lines


def test_another_model(source: Path, recipe: Path, tmp_path: Path) -> None:
    stop(recipe)
    other = make_plain_checkpoint(tmp_path / "larger", layers=4, wide=128)
    with pytest.raises(OtherRun) as caught:
        run(recipe, f"model.source={other}")
    lines = str(caught.value).splitlines()
    assert lines[1] == "  model.source: source then, larger now" and len(lines) < 9
    assert any(line.startswith(f"  source: {FIRST}: ") and " bytes then, " in line for line in lines)
    assert "layout" not in str(caught.value)


# --- recipe keys -------------------------------------------------------------------------------------

CHANGES = {
    "ignore=['re:.*down_proj']": 'ignore: [] then, ["re:.*down_proj"] now',
    "shard_size=1MB": "shard_size: 5 GB then, 1 MB now",
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_changed_recipe_names_its_key(override: str, recipe: Path, tmp_path: Path) -> None:
    stop(recipe)
    for begun in (True, False):
        with pytest.raises(OtherRun) as caught:
            run(recipe, override)
        start, line, advice = str(caught.value).splitlines()
        assert line == f"  {CHANGES[override]}" and "--fresh" in advice
        assert ("another run began this" in start, caught.value.begun) == (begun, begun)
        assert [each["key"] for each in caught.value.differences] == [override.partition("=")[0]]
        run(recipe)


@pytest.fixture
def calibrated(tmp_path: Path, trained: Callable[[str], Path]) -> Path:
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"caption": text}) + "\n" for text in SENTENCES))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        CALIBRATED.format(source=trained("qwen2_5_vl_coco"), output=tmp_path / "out", backend="modelopt", scheme="fp8",
                          captions=captions, samples=6)
    )  # fmt: skip
    return recipe


def test_a_changed_calibration_names_its_keys(calibrated: Path, tmp_path: Path) -> None:
    """Against a stopped run, and against its result."""
    other, captions = tmp_path / "other.jsonl", tmp_path / "captions.jsonl"
    other.write_text(captions.read_text().replace("ladder", "bridge"))
    said = {
        ("calibration.samples=3",): ["calibration.samples: 6 then, 3 now"],
        ("calibration.seed=5", "calibration.samples=3"): [
            "calibration.samples: 6 then, 3 now",
            "calibration.seed: 0 then, 5 now",
        ],
        (f"calibration.captions={other}",): ["calibration.captions: captions.jsonl then, other.jsonl now"],
        ("calibration.batch_tokens=16",): ["calibration.batch_tokens: 4096 then, 16 now"],
        ("backend_options={exact: true}",): ["backend_options.exact: false then, true now"],
        ("runtime.threads=7",): ["runtime.threads: 2 then, 7 now"],
    }
    run(calibrated, "runtime.threads=2", f"output={tmp_path / 'whole'}")
    stop(calibrated, "runtime.threads=2", after=2)
    (tmp_path / "whole").rename(tmp_path / "aside")
    for output in ("out", "whole"):
        if output == "whole":
            (tmp_path / "aside").rename(tmp_path / "whole")
        for overrides, lines in list(said.items())[: None if output == "out" else 1]:
            threads = () if "threads" in overrides[0] else ("runtime.threads=2",)
            with pytest.raises(OtherRun) as caught:
                run(calibrated, f"output={tmp_path / output}", *threads, *overrides)
            assert str(caught.value).splitlines()[1:-1] == [f"  {line}" for line in lines]
        text = captions.read_text()
        captions.write_text(text.replace("box", "bag"))
        with pytest.raises(OtherRun, match=r"  calibration.captions: the contents of captions.jsonl changed\n"):
            run(calibrated, f"output={tmp_path / output}", "runtime.threads=2")
        captions.write_text(text)
        where = tmp_path / "deep" / output / "captions.jsonl"
        where.parent.mkdir(parents=True)
        shutil.copyfile(captions, where)
    overrides = (f"output={tmp_path / 'whole'}", "runtime.threads=2", f"calibration.captions={where}")
    assert run(calibrated, *overrides).already, "the same captions from another place"


def test_a_stopped_calibration_goes_on_with_a_copy_and_not_with_another_source(
    calibrated: Path, tmp_path: Path
) -> None:
    original = Path(load(calibrated).model.source)
    place = tmp_path / "copy"
    shutil.copytree(original, place, copy_function=shutil.copyfile)
    run(calibrated, f"output={tmp_path / 'whole'}")
    units = (tmp_path / "whole" / JOURNAL).read_text().count('"unit"')
    done = stop(calibrated, after=units - 1)
    tensor = next(name for name in all_tensors(place) if name.endswith("layers.0.self_attn.q_proj.weight"))
    flip(place, tensor)
    with pytest.raises(OtherRun, match=f"the bytes of {tensor} changed"):
        run(calibrated, f"model.source={place}")
    flip(place, tensor)
    run(calibrated, f"model.source={place}")
    assert finished_when_begun(tmp_path / "out") == [0, done]
    assert all_tensors(tmp_path / "out") == all_tensors(tmp_path / "whole")


def test_what_is_no_recipe_key_is_said_in_words() -> None:
    before = {
        "pipeline": "0.1.0", "library.compressed-tensors": "0.18.0", "device": "cpu AVX2", "recipe": {}, "units": [1],
        "layout": "a",
    }  # fmt: skip
    now = {**before, "pipeline": "0.2.0", "library.compressed-tensors": "0.19.0", "device": "cpu AVX512"}

    def texts(**more: Any) -> list[str]:
        return [each.text for each in compare(Recorded(before), {**now, **more}).differences]

    assert texts() == [
        "processor: cpu AVX2 then, cpu AVX512 now; bits may differ",
        "compressed-tensors 0.18.0 then, 0.19.0 now",
        "fp8-pipeline 0.1.0 then, 0.2.0 now",
    ]
    assert [each.text for each in compare(Recorded(before), {**before, "layout": "b"}).differences] == [
        "this program lays the same tensors out differently now"
    ]
    another = {key: value for key, value in before.items() if key != "device"} | {"scheme": "none"}
    made = compare(Recorded({**before, "scheme": "fp8"}), another)
    assert [each.as_json() for each in made.differences] == [
        {
            "subject": "recipe", "text": "scheme: fp8 then, none now", "key": "scheme", "file": None, "then": "fp8",
            "now": "none",
        }
    ]  # fmt: skip
    assert made.fields == {"scheme", "device"}


def test_programs_get_the_differences_as_data(recipe: Path) -> None:
    run(recipe)
    done = CliRunner().invoke(main, ["plan", "--json", str(recipe), "shard_size=1MB"])
    plan = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 0 and plan["state"] == "refused"
    assert [(each["key"], each["then"], each["now"]) for each in plan["differences"]] == [
        ("shard_size", 5_000_000_000, 1_000_000)
    ]


# --- what is recorded --------------------------------------------------------------------------------


def test_a_journal_tells_nobody_a_path(recipe: Path, source: Path, tmp_path: Path) -> None:
    run(recipe)
    assert str(tmp_path) not in (tmp_path / "out" / JOURNAL).read_text()
    found = read_identity(tmp_path / "out")
    assert found is not None and found["source"] == source.name


def test_a_batch_shows_what_stands(recipe: Path, source: Path, tmp_path: Path, quantize: Any) -> None:
    assert quantize(recipe).returncode == 0
    batch = ("batch", recipe, "--directory", tmp_path / "batch", "--dry-run")
    copy(source).rename(source)
    assert "1 published already" in quantize(*batch).stdout
    refused = quantize(*batch, "ignore=['re:.*down_proj']")
    assert 'ignore: [] then, ["re:.*down_proj"] now' in refused.stdout


# --- journals of earlier versions --------------------------------------------------------------------


def as_before(directory: Path, recipe: Path) -> None:
    """Write a journal as version 0.1.0 did before it knew a source by its contents."""
    plan = make_plan(load(recipe), hub.resolve(load(recipe).model.source, None))
    first, *rest = (directory / JOURNAL).read_text().splitlines()
    identity = json.loads(first)["identity"]
    del identity["recipe"]
    identity["source"] = str(plan.checkpoint.root.resolve())
    for shard in plan.checkpoint.shards:
        assert shard.path is not None
        row = [shard.size, shard.header_sha256, shard.modified, _sample(shard.path, shard.size)]
        identity[f"source.{shard.name}"] = row
    for name in plan.checkpoint.sidecars:
        status = (plan.checkpoint.root / name).stat()
        identity[f"source.{name}"] = [status.st_size, status.st_mtime_ns]
    lines = [json.loads(line) for line in rest]
    for line in lines:
        line.pop("source", None)
    entries = [{"identity": identity}, *lines]
    (directory / JOURNAL).write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries))


def test_an_earlier_journal_goes_on_and_is_published_without_a_path(recipe: Path, tmp_path: Path) -> None:
    done = stop(recipe)
    as_before(tmp_path / "out.partial", recipe)
    assert str(tmp_path) in (tmp_path / "out.partial" / JOURNAL).read_text()
    with pytest.raises(OtherRun, match="shard_size: 5 GB then, 1 MB now"):
        run(recipe, "shard_size=1MB")
    run(recipe)
    assert finished_when_begun(tmp_path / "out") == [0, done]
    assert str(tmp_path) not in (tmp_path / "out" / JOURNAL).read_text()
    record = read_record(tmp_path / "out")
    assert record is not None and record.stamps and run(recipe).already


def test_an_earlier_result_is_done_already(recipe: Path, source: Path, tmp_path: Path) -> None:
    run(recipe)
    as_before(tmp_path / "out", recipe)
    assert run(recipe).already
    with pytest.raises(OtherRun, match="shard_size: 5 GB then, 1 MB now"):
        run(recipe, "shard_size=1MB")
    flip(source, QUANTIZED)
    with pytest.raises(OtherRun, match="kept no hashes of it"):
        run(recipe)


def test_an_earlier_replacement_goes_on(recipe: Path, tmp_path: Path) -> None:
    run(recipe)
    as_before(tmp_path / "out", recipe)
    done = stop(recipe, fresh=True)
    as_before(tmp_path / "out.partial", recipe)
    assert not run(recipe).already
    assert finished_when_begun(tmp_path / "out") == [0, done]


def test_the_hub_knows_its_contents_by_the_commit() -> None:
    """The same commit is never read again; the same bytes of another commit, or from a directory, are compared."""
    shard, fields = [9, "header", None], {"recipe": {}, "source": "org/name", "source.revision": "a"}
    before = {**fields, "source.model.safetensors": shard}

    def seen(place: str, revision: str | None) -> identities.Seen:
        stamps = {} if revision else {"model.safetensors": ["x", "y"]}
        return identities.Seen(place, revision, {"model.safetensors": 0}, {}, stamps)

    assert not compare(Recorded(before), Identity(before, seen("org/name", "a"))).moved
    later = {**before, "source.revision": "b"}
    found = compare(Recorded(before), Identity(later, seen("org/name", "b")))
    assert found.moved == {"model.safetensors"} and not found.fields
    local = {**before, "source": "copy", "source.revision": None, "source.model.safetensors": [9, "header", "sampled"]}
    found = compare(Recorded(before), Identity(local, seen("/data/copy", None)))
    assert found.moved == {"model.safetensors"} and not found.fields
