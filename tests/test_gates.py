"""The gates that a result passes before it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import VerificationFailed
from pipeline.recipe import recipe
from pipeline.report.console import Console
from pipeline.run import gates, runner
from pipeline.verify.report import Report
from pipeline.verify.verify import verify
from tests.conftest import RECIPE, make_plain_checkpoint


def made(tmp_path: Path, *overrides: str) -> tuple[Path, recipe.Recipe]:
    """A source, and a recipe for it."""
    source = make_plain_checkpoint(tmp_path / "source")
    return source, recipe.parse(RECIPE.format(source=source, output=tmp_path / "out"), overrides=overrides)


def test_gates_and_the_command_come_to_one_report(tmp_path: Path) -> None:
    source, wanted = made(tmp_path)
    out = runner.run(wanted, Console(quiet=True)).output
    asked = wanted.model_copy(update={"verify": "load"})
    candidate = gates.Candidate(out, open_checkpoint(source), asked, None, lambda text: None)
    report = gates.pass_gates(candidate, (gates.structure, gates.vllm))
    same = verify(out, open_checkpoint(source), "load")
    same.checkpoint = out.name
    assert report.as_json() == same.as_json() and report is candidate.report
    assert report.passed and (report.level, report.asked) == ("structure", "load")
    assert report.findings[-1].code == "vllm-missing" and report.checked == gates.structure(candidate).checked


def test_one_more_gate_is_one_more_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees what was found before it, what it finds goes into the same file, and a problem keeps all unpublished."""
    _, wanted = made(tmp_path)
    seen: list[Any] = []

    def third(candidate: gates.Candidate) -> Report:
        seen.append((candidate.directory, candidate.recipe, len(candidate.report.checked)))
        report = Report(str(candidate.directory), None, candidate.report.produced_here)
        report.checked.append("the third gate was there")
        report.add("engine-not-finite", "", "the third gate finds a problem")
        return report

    monkeypatch.setattr(runner, "pass_gates", lambda candidate: gates.pass_gates(candidate, [*gates.GATES, third]))
    with pytest.raises(VerificationFailed, match=r"is not published; .*\n  the third gate finds a problem$"):
        runner.run(wanted, Console(quiet=True))
    partial = tmp_path / "out.partial"
    verdict = json.loads((partial / "quantize" / "verify.json").read_text())
    assert seen == [(partial, wanted, len(verdict["checked"]) - 1)] and seen[0][2] > 3
    assert not verdict["passed"] and verdict["problems"] == ["the third gate finds a problem"]
    assert verdict["checked"][-1] == "the third gate was there" and not (tmp_path / "out").exists()


def test_reports_of_gates_are_merged() -> None:
    """The furthest level counts, and a problem of any gate ends vLLM's word."""
    whole, loaded, third = (Report("out", None, True) for _ in range(3))
    loaded.level, loaded.asked, loaded.proven_in_vllm, loaded.vllm = "load", "generate", True, {"server": "vllm"}
    whole.merge(loaded)
    whole.merge(third)
    assert (whole.level, whole.asked, whole.proven_in_vllm, whole.vllm) == (
        "load",
        "generate",
        True,
        {"server": "vllm"},
    )
    third.add("hash-differs", "a", "a: its bytes")
    whole.merge(third)
    assert not whole.proven_in_vllm and whole.problems == ["a: its bytes"] and whole.level == "load"
