"""Runs from end to end: publishing, resuming, identities, locks and signals, as processes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.result import JOURNAL
from pipeline.errors import PipelineError, UsageError
from pipeline.journal import Journal
from pipeline.plan import layout
from pipeline.plan import plan as plans
from pipeline.recipe.recipe import load
from pipeline.report.console import Console
from pipeline.report.outcome import Outcome
from pipeline.run import finalize as finalizing
from pipeline.run import runner
from pipeline.serving import profile_check
from tests.conftest import (
    CALIBRATED,
    QUANTIZE,
    all_tensors,
    assert_one_clear_line,
    make_plain_checkpoint,
    weight_files,
)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units and pieces in a small checkpoint."""
    monkeypatch.setattr(layout, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(layout, "PIECE_BYTES", 3_000)


def run(recipe: Path, *overrides: str, fresh: bool = False) -> Outcome:
    return runner.run(load(recipe, overrides), Console(), fresh)


def test_a_published_checkpoint(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "model.gguf").write_bytes(b"x")
    (source / "README.md").write_text("the source's card")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    done = quantize(write_recipe(source))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert "published" in done.stdout and not (tmp_path / "out.partial").exists()
    assert {path.name for path in out.iterdir()} == {
        "README.md", "additional_chat_templates", "config.json", "model.safetensors", "model.safetensors.index.json",
        "quantize", "tokenizer_config.json",
    }  # fmt: skip
    assert {path.name for path in (out / "quantize").iterdir()} == {
        "events.jsonl", "files.json", "journal.jsonl", "layers.json", "recipe.yaml", "serve.yaml", "verify.json",
        "versions.json",
    }  # fmt: skip
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    tensors, index = all_tensors(out), json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert load(out / "quantize" / "recipe.yaml").model.source == "source", "a path of this machine is not published"


def test_a_second_identical_run_says_so_and_changes_nothing(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize(recipe).returncode == 0
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    done = quantize(recipe, "runtime.threads=1")
    assert done.returncode == 0 and "done already" in done.stdout
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert not (tmp_path / "out.partial").exists()


def test_a_published_result_whose_small_files_changed_is_not_called_done(
    tmp_path: Path, quantize: Any, write_recipe: Any
) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize(recipe).returncode == 0
    path = tmp_path / "out" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"num_hidden_layers"', '"num_layers"'))
    done = quantize(recipe)
    assert done.returncode == 1 and "config.json: it is not the file that the run wrote" in done.stderr
    assert "--fresh" in done.stderr
    path.unlink()
    assert "config.json: recorded by the run, absent here" in quantize(recipe).stderr
    path.write_text(text)
    assert "done already" in quantize(recipe).stdout


def test_another_recipe_is_refused_and_fresh_replaces(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize(recipe).returncode == 0
    refused = quantize(recipe, "ignore=['re:.*down_proj']")
    assert refused.returncode == 2
    assert 'ignore: [] then, ["re:.*down_proj"] now' in refused.stderr and "--fresh" in refused.stderr
    assert all_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"][0] == "F8_E4M3"
    done = quantize(recipe, "ignore=['re:.*down_proj']", "--fresh")
    assert done.returncode == 0, done.stderr
    assert all_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"][0] == "BF16"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_a_changed_source_is_another_run(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    recipe = write_recipe(source)
    assert quantize(recipe).returncode == 0
    shard = source / "model-00001-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    done = quantize(recipe)
    assert done.returncode == 0 and "done already" in done.stdout, "touched alone"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    refused = quantize(recipe)
    assert refused.returncode == 2
    assert "source: model-00001-of-00002.safetensors: " in refused.stderr and "--fresh" in refused.stderr


def end_early(recipe: Path, count: int, kind: str = "crash") -> PipelineError:
    """Run until `count` units are recorded, then end: by a real signal, or by a failing disk."""
    original, seen = Journal.finish, []

    def finish(self: Journal, unit: int, *arguments: Any) -> None:
        original(self, unit, *arguments)
        seen.append(unit)
        if len(seen) == count:
            if kind == "crash":
                raise OSError(5, "Input/output error")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", finish)
        with pytest.raises(PipelineError) as caught:
            run(recipe)
    return caught.value


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["signal", "crash"])
def test_resume_gives_the_same_bytes(
    kind: str, count: int, tmp_path: Path, write_recipe: Any, small_units: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source", layers=4), more="shard_size: 1MB\n")
    run(recipe, f"output={tmp_path / 'whole'}")
    assert end_early(recipe, count, kind).exit_status == (75 if kind == "signal" else 1)
    assert not (tmp_path / "out").exists()
    entries = [json.loads(line) for line in (tmp_path / "out.partial" / JOURNAL).read_text().splitlines()]
    finished = len(entries) - 1
    assert count <= finished < layout.UNIT_BYTES
    stamps = {e["unit"] for e in entries[1:]}
    capsys.readouterr()
    run(recipe)
    told = capsys.readouterr().out
    assert f"going on after {finished} of " in told and "are written again" in told
    again = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()]
    assert [e for e in again[1:] if e["unit"] in stamps] == entries[1:], "a finished unit was done twice"
    resumed = next(
        json.loads(line)
        for line in (tmp_path / "out" / "quantize" / "events.jsonl").read_text().splitlines()
        if '"event":"resume"' in line
    )
    assert 0 < resumed["bytes_rewritten_at_most"] <= layout.UNIT_BYTES
    whole, out = weight_files(tmp_path / "whole"), weight_files(tmp_path / "out")
    for name in (
        "quantize/recipe.yaml",
        "quantize/serve.yaml",
        "quantize/verify.json",
        "README.md",
    ):  # they name the output
        assert whole.pop(name).replace(b"whole", b"out") == out.pop(name)
    assert whole == out


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_stop_in_the_last_unit_is_no_end(
    calibrated: bool, tmp_path: Path, write_recipe: Any, small_units: None, request: pytest.FixtureRequest
) -> None:
    """What follows it may take long: the next run seals, verifies and publishes, and converts nothing."""
    if calibrated:
        source, captions = request.getfixturevalue("small_model")("qwen3"), request.getfixturevalue("captions")
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            CALIBRATED.format(
                source=source, output=tmp_path / "out", backend="modelopt", scheme="fp8", captions=captions, samples=4
            )
        )
    else:
        recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    run(recipe, f"output={tmp_path / 'whole'}")
    units = (tmp_path / "whole" / JOURNAL).read_text().count('"unit"')
    stopped = end_early(recipe, units, "signal")
    assert stopped.exit_status == 75 and f"stopped after {units} of {units} units" in str(stopped)
    assert not (tmp_path / "out").exists()
    outcome = run(recipe)
    assert outcome.report is not None and outcome.report.passed and outcome.totals.units == 0
    whole, out = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "out")
    assert whole == out


def test_finished_bytes_are_not_touched_again(tmp_path: Path, write_recipe: Any, small_units: None) -> None:
    """What the journal counts as done is really left alone: a byte changed there survives, and verify finds it."""
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source", layers=4))
    end_early(recipe, 2)
    journal = [json.loads(line) for line in (tmp_path / "out.partial" / JOURNAL).read_text().splitlines()]
    name, offset, nbytes, _ = journal[1]["pieces"][0]
    with (tmp_path / "out.partial" / "model.safetensors").open("r+b") as file:
        file.seek(offset + nbytes - 1)
        byte = file.read(1)[0]
        file.seek(offset + nbytes - 1)
        file.write(bytes([byte ^ 1]))
    run(recipe)
    from pipeline.verify.structure import check_structure

    report = check_structure(tmp_path / "out", contents=True)
    assert report.problems == [f"{name}: its bytes are not those that the run wrote (SHA-256 differs)"]


def test_a_torn_journal_line_is_cut_off(tmp_path: Path, write_recipe: Any, small_units: None) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source", layers=4))
    end_early(recipe, 2)
    journal = tmp_path / "out.partial" / JOURNAL
    raw = journal.read_bytes()
    journal.write_bytes(raw[:-30])
    run(recipe)
    assert (tmp_path / "out").is_dir()


def test_a_damaged_journal_is_refused(tmp_path: Path, write_recipe: Any, small_units: None) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source", layers=4))
    end_early(recipe, 2)
    journal = tmp_path / "out.partial" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(UsageError, match="journal is damaged"):
        run(recipe)
    run(recipe, fresh=True)


def test_other_versions_do_not_go_on(tmp_path: Path, write_recipe: Any, small_units: None) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source", layers=4))
    end_early(recipe, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "__version__", "9.9")
        with pytest.raises(UsageError, match=r"fp8-pipeline 0\.1\.0 then, 9\.9 now"):
            run(recipe)


def test_two_runs_on_one_output(tmp_path: Path, write_recipe: Any, quantize: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    journal = Journal.open(tmp_path / "out.partial", {"held": True})
    try:
        for options in ((), ("--fresh",)):
            assert_one_clear_line(quantize(recipe, *options), 1, "another run is writing here")
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("number", "ignored"),
    [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGHUP, True)],
)
def test_a_signal_saves_and_exits_75(
    number: int, ignored: bool, tmp_path: Path, write_recipe: Any, quantize: Any
) -> None:
    """A real process, a real signal, in the middle of a stream that a slow pipe of pieces keeps long enough.

    Under nohup a hangup is nothing.
    """
    source = make_plain_checkpoint(tmp_path / "source", layers=6)
    recipe = write_recipe(source)
    code = (
        "import sys, time; from pipeline.plan import layout; from pipeline.stream import data_free as stream\n"
        "layout.UNIT_BYTES = 20_000; layout.PIECE_BYTES = 3_000\n"
        "read = stream.read_exactly\n"
        "def slow(*a): time.sleep(0.01); read(*a)\n"
        "stream.read_exactly = slow\n"
        "from pipeline.cli import main; main(sys.argv[1:], prog_name='quantize')"
    )
    process = subprocess.Popen(
        [QUANTIZE[0], "-c", code, recipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )  # fmt: skip
    journal = tmp_path / "out.partial" / JOURNAL
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if ignored:
        assert process.returncode == 0 and (tmp_path / "out").is_dir(), out + err
        return
    assert process.returncode == 75, out + err
    assert "Traceback" not in out + err
    assert "run the same command again to go on" in err
    assert not (tmp_path / "out").exists()
    last = json.loads((tmp_path / "out.partial" / "quantize" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "interrupted"


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGHUP, signal.SIGHUP)])
def test_publishing_is_not_interrupted(
    numbers: tuple[int, ...], tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real signals in the middle of it; a terminal that is closed may send two."""
    recipe, publish = write_recipe(make_plain_checkpoint(tmp_path / "source")), runner.publish

    def hit(*arguments: Any, **options: Any) -> bool:
        for number in numbers:
            os.kill(os.getpid(), number)
        return publish(*arguments, **options)

    monkeypatch.setattr(runner, "publish", hit)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        assert run(recipe).output.is_dir()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "quantize" / "lock").exists()


def test_a_result_that_fails_verification_is_not_published(
    tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config forgets to ignore the head: the structural check must stop it, and the next run must not pass."""

    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    write = finalizing.config_with
    with monkeypatch.context() as patch:
        patch.setattr(finalizing, "config_with", lambda text, section: write(text, {**section, "ignore": []}))
        for _ in range(2):
            with pytest.raises(PipelineError, match="lm_head: BF16, but the config does not ignore it"):
                run(recipe)
            assert not (tmp_path / "out").exists()
    verdict = json.loads((tmp_path / "out.partial" / "quantize" / "verify.json").read_text())
    assert not verdict["passed"] and not verdict["proven_in_vllm"]
    run(recipe)
    assert (tmp_path / "out").is_dir()


def test_events_timings_and_trace(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "source", layers=3)
    assert quantize(write_recipe(source)).returncode == 0
    layers = {row["layer"]: row for row in json.loads((tmp_path / "out" / "quantize" / "layers.json").read_text())}
    assert {f"model.layers.{i}" for i in range(3)} <= set(layers)
    assert sum(row["bytes_read"] for row in layers.values()) == sum(len(t[2]) for t in all_tensors(source).values())
    for row in layers.values():
        assert row["rss_bytes"] > 1e6 and min(row["read_s"], row["quantize_s"], row["write_s"]) >= 0
    done = quantize("trace", tmp_path / "out", "-o", tmp_path / "trace.json")
    assert done.returncode == 0, done.stderr
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in trace if event["ph"] == "X"]
    assert {event["cat"] for event in complete} == {"read", "quantize", "write", "flush"}
    assert all(isinstance(event["ts"], int) and event["dur"] > 0 for event in complete)
    named = {event["tid"] for event in trace if event["ph"] == "M"}
    assert {event["tid"] for event in complete} <= named


def test_progress_for_a_log_and_for_a_terminal(tmp_path: Path, write_recipe: Any, monkeypatch, capsys) -> None:
    from pipeline.report import console

    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.0)
    run(recipe)
    told = capsys.readouterr().out
    assert "model.layers.1: " in told and "s left" in told and "(100%)" in told
    shown = Console()
    import io

    from rich.console import Console as Rich

    shown.rich = Rich(file=io.StringIO(), force_terminal=True, width=100)
    runner.run(load(recipe, [f"output={tmp_path / 'other'}"]), shown)
    assert "172.7/172.7 kB" in shown.rich.file.getvalue() and "/s" in shown.rich.file.getvalue()


# --- what must never happen --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["removed", "shortened"])
def test_a_shard_lost_between_runs_is_written_again(
    loss: str, tmp_path: Path, write_recipe: Any, small_units: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A power cut or a cleaner may take a shard although the journal counts it as done."""
    recipe = write_recipe(
        make_plain_checkpoint(tmp_path / "source", layers=4, vocabulary=9000), more="shard_size: 1MB\n"
    )
    run(recipe, f"output={tmp_path / 'whole'}")
    end_early(recipe, 40)
    shard = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
    if loss == "removed":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 9000)
    end_early(recipe, 1)  # and a second crash after it was noticed
    assert "missing or short, although finished before" in capsys.readouterr().out
    run(recipe)
    assert all_tensors(tmp_path / "out") == all_tensors(tmp_path / "whole")
    from pipeline.verify.structure import check_structure

    assert check_structure(tmp_path / "out", contents=True).problems == []


def test_a_published_result_that_lost_a_shard_is_not_done(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize(recipe).returncode == 0
    os.truncate(tmp_path / "out" / "model.safetensors", 5000)
    assert_one_clear_line(quantize(recipe), 1, "missing or damaged", "--fresh")
    assert quantize(recipe, "--fresh").returncode == 0


def test_the_source_may_not_be_the_place_of_work(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = make_plain_checkpoint(tmp_path / "out.partial")
    before = {path: path.read_bytes() for path in source.rglob("*")}
    for options in ((), ("--fresh",)):
        assert_one_clear_line(quantize(write_recipe(source), *options), 2, "never written to")
    assert {path: path.read_bytes() for path in source.rglob("*")} == before


@pytest.mark.parametrize("options", [(), ("--fresh",)])
def test_a_third_partys_partial_is_left_alone(options: tuple, tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    assert_one_clear_line(quantize(recipe, *options), 2, "mine.txt", "move it away")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_directory_that_appears_meanwhile_is_left_alone(
    fresh: bool, tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    finalize = finalizing.finalize

    def appear(*arguments: Any) -> None:
        finalize(*arguments)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("years of work")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "finalize", appear)
        with pytest.raises(UsageError, match="no result of this program"):
            run(recipe, fresh=fresh)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_another_fine_tune_with_the_same_headers_and_times(
    tmp_path: Path, write_recipe: Any, small_units: None
) -> None:
    """Unpacked with the same mtimes, in the same place: only the content differs, and that is noticed."""
    source = make_plain_checkpoint(tmp_path / "source", layers=4)
    recipe = write_recipe(source)
    end_early(recipe, 2)
    for path in source.glob("*.safetensors"):
        times = path.stat().st_mtime_ns
        raw = bytearray(path.read_bytes())
        raw[-len(raw) // 2 :] = bytes(b ^ 1 for b in raw[-len(raw) // 2 :])
        path.write_bytes(raw)
        os.utime(path, ns=(times, times))
    with pytest.raises(UsageError, match="safetensors: its weights changed"):
        run(recipe)


def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, write_recipe: Any, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_plain_checkpoint(tmp_path / "source", layers=4, shards=1)
    recipe = write_recipe(source)
    original, seen = Journal.finish, []

    def finish(self: Journal, unit: int, *recorded: Any) -> None:
        original(self, unit, *recorded)
        seen.append(unit)
        if len(seen) == 2:
            os.utime(source / "model.safetensors", ns=(7, 7))

    monkeypatch.setattr(Journal, "finish", finish)
    with pytest.raises(PipelineError, match="the file changed since the plan was made"):
        run(recipe)
    assert len(seen) == 2, "nothing read after the change is recorded as done"
    assert not (tmp_path / "out").exists()


# --- the serving profile of a finished result --------------------------------------------------------


@pytest.mark.vllm
def test_long_work_ends_early_over_a_profile_that_vllm_refuses(
    tmp_path: Path, small_model: Any, write_recipe: Any, monkeypatch: pytest.MonkeyPatch, small_units: None
) -> None:
    """The third read waits for vLLM, as if the source took minutes; what is finished is not made again."""
    from pipeline.stream import data_free as stream

    recipe = write_recipe(small_model("qwen3"))
    read, ask = stream.read_exactly, profile_check.hold_against
    reads, answered = itertools.count(1), threading.Event()

    def slow(*arguments: Any) -> None:
        if next(reads) > 2:
            assert answered.wait(300)
            time.sleep(0.1)
        read(*arguments)

    def held(*arguments: Any) -> Any:
        try:
            return ask(*arguments)
        finally:
            answered.set()

    with monkeypatch.context() as patch:
        patch.setattr(profile_check, "EARLY", 0)
        patch.setattr(profile_check, "hold_against", held)
        patch.setattr(stream, "read_exactly", slow)
        with pytest.raises(UsageError, match=r"serve: vllm.* refuses the profile: unrecognized arguments: --prot 8001"):
            run(recipe, "verify=load", "serve={extra: {prot: 8001}}")
    done = (tmp_path / "out.partial" / JOURNAL).read_text().count('"unit"')
    assert done and not (tmp_path / "out").exists()
    monkeypatch.setattr(profile_check, "EARLY", 0)
    outcome = run(recipe, "verify=load", "serve={extra: {port: 8001}}")
    assert outcome.report is not None and outcome.report.proven_in_vllm
    events = (tmp_path / "out" / "quantize" / "events.jsonl").read_text()
    assert f'"units_done":{done}' in events
