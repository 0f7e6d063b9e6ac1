"""Replacing a result: what a stopped run has finished is never thrown away unless that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.checkpoint.result import JOURNAL
from pipeline.cli import main
from pipeline.errors import OtherRun
from pipeline.events import read_events
from pipeline.journal import read_identity
from pipeline.plan import layout
from tests.conftest import all_tensors, make_plain_checkpoint
from tests.stopping import run, stopped

DOWN = "model.layers.0.mlp.down_proj.weight"
OTHER = "ignore=['re:.*down_proj']"


@pytest.fixture
def old(tmp_path: Path, write_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose result is published, of many units."""
    monkeypatch.setattr(layout, "UNIT_BYTES", 20_000)
    recipe: Path = write_recipe(make_plain_checkpoint(tmp_path / "source", layers=4))
    run(recipe)
    return recipe


def units_before(output: Path) -> list[int]:
    """How many units were finished when each run of a result began."""
    return [event["done"] for event in read_events(output / "quantize" / "events.jsonl") if event["event"] == "run"]


@pytest.mark.parametrize("again", [{}, {"fresh": True}])
def test_a_stopped_replacement_goes_on_and_replaces(
    again: dict[str, bool], old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same command, and with the command without --fresh."""
    finished = stopped(old, OTHER, fresh=True)
    assert all_tensors(tmp_path / "out")[DOWN][0] == "F8_E4M3", "the older result stands until the new one is whole"
    second = stopped(old, OTHER, **again)  # stopped once more
    capsys.readouterr()
    outcome = run(old, OTHER, **again)
    told = capsys.readouterr().out
    assert "going on after" in told and "starting over" not in told
    assert outcome.report is not None and outcome.report.passed
    assert all_tensors(tmp_path / "out")[DOWN][0] == "BF16"
    assert units_before(tmp_path / "out") == [0, finished, finished + second]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_the_same_recipe_over_its_own_result(old: Path, tmp_path: Path) -> None:
    finished = stopped(old, fresh=True)
    assert not run(old).already
    assert units_before(tmp_path / "out") == [0, finished]
    assert run(old).already


def test_what_a_run_without_fresh_finished_is_kept_with_it(old: Path, tmp_path: Path) -> None:
    """Another result appears at the output while a run is stopped: --fresh replaces it, and loses no unit."""
    (tmp_path / "out").rename(tmp_path / "aside")
    finished = stopped(old, OTHER)
    (tmp_path / "aside").rename(tmp_path / "out")
    with pytest.raises(OtherRun, match="it is the result of another run"):
        run(old, OTHER)
    run(old, OTHER, fresh=True)
    assert units_before(tmp_path / "out") == [0, finished]


def test_another_result_than_the_one_to_be_replaced_stays(old: Path, tmp_path: Path) -> None:
    stopped(old, OTHER, fresh=True)
    run(old, "output=" + str(tmp_path / "third"), "ignore=['re:.*o_proj']")
    (tmp_path / "out").rename(tmp_path / "aside")
    (tmp_path / "third").rename(tmp_path / "out")
    before = read_identity(tmp_path / "out")
    with pytest.raises(OtherRun, match="it is the result of another run"):
        run(old, OTHER)
    assert read_identity(tmp_path / "out") == before and (tmp_path / "out.partial" / JOURNAL).exists()


def test_restart_throws_away_what_was_finished(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped(old, OTHER, fresh=True)
    capsys.readouterr()
    run(old, OTHER, restart=True)  # it was begun to replace, and still does
    assert f"starting over: what {tmp_path / 'out.partial'} held is thrown away" in capsys.readouterr().out
    assert units_before(tmp_path / "out") == [0] and all_tensors(tmp_path / "out")[DOWN][0] == "BF16"


def test_a_stopped_run_of_another_recipe_gives_way_to_fresh(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(old, OTHER, fresh=True)
    third = "ignore=['re:.*o_proj']"
    (tmp_path / "out").rename(tmp_path / "aside")
    with pytest.raises(OtherRun, match="another run began this"):
        run(old, third)
    (tmp_path / "aside").rename(tmp_path / "out")
    capsys.readouterr()
    run(old, third, fresh=True)
    assert "starting over" in capsys.readouterr().out and units_before(tmp_path / "out") == [0]


def test_a_torn_line_does_not_hide_what_is_replaced(old: Path, tmp_path: Path) -> None:
    finished = stopped(old, OTHER, fresh=True)
    with (tmp_path / "out.partial" / JOURNAL).open("a") as journal:
        journal.write('{"unit":')
    run(old, OTHER)
    assert units_before(tmp_path / "out") == [0, finished]


def test_on_the_command_line(old: Path, tmp_path: Path) -> None:
    """The command that a stop names, typed again."""
    finished = stopped(old, OTHER, fresh=True)
    done = CliRunner().invoke(main, [str(old), OTHER, "--fresh"])
    assert done.exit_code == 0 and "going on after" in done.stdout and "starting over" not in done.stdout
    assert units_before(tmp_path / "out") == [0, finished]
    done = CliRunner().invoke(main, [str(old), OTHER, "--smoke", "--restart"])
    assert done.exit_code == 2 and "--restart: it belongs to a whole run" in done.stderr


def test_a_batch_replaces_what_other_recipes_made(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    """Its advice works when it is followed, and what it has replaced stays."""
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize(recipe).returncode == 0
    batch = ("batch", recipe, OTHER, "--directory", tmp_path / "batch")
    refused = quantize(*batch)
    assert refused.returncode == 1 and "replace it with --fresh" in refused.stdout
    assert all_tensors(tmp_path / "out")[DOWN][0] == "F8_E4M3"
    done = quantize(*batch, "--fresh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all_tensors(tmp_path / "out")[DOWN][0] == "BF16"
    written = (tmp_path / "out/config.json").stat().st_mtime_ns
    again = quantize(*batch, "--fresh")
    assert again.returncode == 0 and "1 published already" in again.stdout, again.stdout
    assert (tmp_path / "out/config.json").stat().st_mtime_ns == written
