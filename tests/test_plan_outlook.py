"""A plan is shown whatever stands at its output; what the run would make of that is a note."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.checkpoint.result import JOURNAL
from pipeline.cli import main
from pipeline.plan import disk
from tests.conftest import make_plain_checkpoint

TABLE = "every tensor's action"
OTHER = "ignore=['re:.*o_proj']"
Done = namedtuple("Done", "status out told")


def planned(recipe: Path, *overrides: str) -> Done:
    """The plan's exit status, its text, and the same as JSON."""
    shown = CliRunner().invoke(main, ["plan", str(recipe), *overrides])
    told = CliRunner().invoke(main, ["plan", str(recipe), *overrides, "--json"])
    assert shown.exit_code == told.exit_code, told.output
    return Done(shown.exit_code, shown.stdout, json.loads(told.stdout))


@pytest.fixture
def recipe(tmp_path: Path, write_recipe: Any) -> Path:
    return Path(write_recipe(make_plain_checkpoint(tmp_path / "source", layers=3)))


@pytest.fixture
def published(recipe: Path, quantize: Any, tmp_path: Path) -> Path:
    assert quantize(recipe).returncode == 0
    return tmp_path / "out"


def state_of(place: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in place.rglob("*") if p.is_file()}


def test_where_there_is_nothing(recipe: Path, tmp_path: Path) -> None:
    done = planned(recipe)
    assert done.status == 0 and TABLE in done.out and "note:" not in done.out
    lines = done.out.splitlines()
    assert lines[-2].startswith("disk: ") and f"free at {tmp_path}" in lines[-2]
    assert lines[-1].startswith("estimate: about ")
    told = done.told
    assert (told["state"], told["notes"], told["units_done"]) == ("new", [], 0) and told["estimate"]["seconds"] > 0
    assert told["disk"]["directory"] == str(tmp_path) and told["disk"]["free_bytes"] > told["disk"]["needed_bytes"] > 0


def test_where_this_very_result_is_published(recipe: Path, published: Path) -> None:
    before = state_of(published)
    done = planned(recipe)
    assert done.status == 0 and TABLE in done.out and done.told["state"] == "published"
    last = done.out.splitlines()[-1]
    assert last.startswith(f"note: {published}: published already, by an identical run") and "--fresh" in last
    assert state_of(published) == before


def test_where_another_recipes_result_is_published(recipe: Path, published: Path) -> None:
    done = planned(recipe, OTHER)
    assert done.status == 0 and TABLE in done.out and done.told["state"] == "refused"
    (note,) = done.told["notes"]
    assert note.startswith("quantize RECIPE would be refused: ") and "--fresh" in note
    assert f"note: {note}" in done.out


@pytest.mark.parametrize("what", ["a directory of somebody's", "a file", "a link", "a damaged result"])
def test_where_something_else_is(what: str, recipe: Path, tmp_path: Path, quantize: Any) -> None:
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    elif what == "a link":
        out.symlink_to(tmp_path / "source")
    elif what == "a damaged result":
        assert quantize(recipe).returncode == 0
        os.truncate(out / "model.safetensors", 100)
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    done = planned(recipe)
    if what == "a link":  # into the source, which nothing is ever written to
        assert done.status == 2 and "never written to" in done.told["error"]["message"]
        return
    assert done.status == 0 and TABLE in done.out and done.told["state"] == "refused"
    assert "note: quantize RECIPE would be refused: " in done.out


@pytest.mark.parametrize("torn", [False, True])
def test_where_a_run_was_stopped(torn: bool, recipe: Path, published: Path, tmp_path: Path) -> None:
    """Also where a kill tore the journal's last line: a plan cuts nothing off."""
    partial = tmp_path / "out.partial"
    shutil.move(published, partial)
    if torn:
        with (partial / JOURNAL).open("a") as file:
            file.write('{"unit": 7, "pie')
    before = state_of(partial)
    done = planned(recipe)
    assert done.status == 0 and done.told["state"] == "begun" and done.told["units_done"] == done.told["units"] > 0
    units = done.told["units"]
    assert f"note: {partial}: an earlier run has finished {units} of {units} units; quantize RECIPE goes on" in done.out
    assert state_of(partial) == before
    refused = planned(recipe, OTHER)
    assert refused.status == 0 and refused.told["state"] == "refused" and "another run began" in refused.out
    assert state_of(partial) == before


def test_a_disk_that_is_too_small(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown all the same; then the error, with its exit status."""
    space = disk.drive_space
    monkeypatch.setattr(disk, "drive_space", lambda path: replace(space(path), free=1000))
    done = planned(recipe)
    assert done.status == 1 and TABLE in done.out and "1 kB free at" in done.out
    assert done.told["error"]["kind"] == "disk" and done.told["tensors"] and done.told["state"] == "new"


def test_hidden_states_count_as_disk(tmp_path: Path, captions: Path, small_model: Any) -> None:
    from tests.conftest import CALIBRATED

    path = tmp_path / "recipe.yaml"
    source, out = small_model("qwen2_5_vl"), tmp_path / "out"
    values = {"backend": "llmcompressor", "scheme": "fp8_dynamic", "captions": captions, "samples": 4}
    path.write_text(CALIBRATED.format(source=source, output=out, **values))
    (tmp_path / "work").mkdir()
    done = planned(path)
    assert "for hidden states meanwhile" in done.out and done.told["disk"]["hidden_states_bytes"] > 0
    assert done.told["disk"]["work_directory"] is None
    done = planned(path, f"runtime.work_directory={tmp_path / 'work'}")
    assert done.told["disk"]["work_directory"]["directory"] == str(tmp_path / "work")
    assert f"free at {tmp_path / 'work'}" in done.out


def test_nothing_is_cut_in_eighty_columns(recipe: Path, published: Path, quantize: Any) -> None:
    from rich.console import Console as Rich

    from pipeline.checkpoint.source import open_checkpoint
    from pipeline.plan.plan import make_plan
    from pipeline.recipe import recipe as recipes
    from pipeline.report.console import Console
    from pipeline.run.estimate import estimate_by_rule
    from pipeline.run.outlook import outlook

    wanted = recipes.load(recipe, ())
    plan, console = make_plan(wanted, open_checkpoint(Path(wanted.model.source))), Console()
    console.rich = Rich(width=80, force_terminal=True, color_system=None, record=True, quiet=False)
    console.show_plan_table(plan)
    console.show_disk(plan, outlook(plan))
    console.show_estimate(estimate_by_rule(plan, "structure"))
    console.show_outlook(outlook(plan))
    text = console.rich.export_text()
    assert all(len(line) <= 80 for line in text.splitlines()) and "…" not in text
    for word in ("disk: ", "estimate: about", "note: ", "quantize"):
        assert word in text
