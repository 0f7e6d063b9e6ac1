"""What a batch remembers after a kill, after its end, and when a recipe changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.batch import ledger
from pipeline.batch.job import JobResult
from pipeline.batch.manifest import Job
from pipeline.errors import PipelineError


def test_the_ledger_survives(tmp_path: Path) -> None:
    """A kill in the middle of a line; a batch that runs already; a run after the run."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("x")
    jobs = [Job(name, recipe, ()) for name in ("one", "two", "three")]
    book = ledger.Ledger.open(tmp_path / "b", jobs)
    with pytest.raises(PipelineError, match="running already"):
        ledger.Ledger.open(tmp_path / "b", jobs)
    assert ledger.is_running(tmp_path / "b")
    book.begin(command="quantize batch")
    for name in ("one", "two"):
        book.start(book.records[name], 5.0, False)
    book.end(book.records["one"], JobResult("verification", 1, "bad", notes=["n"]))
    book.settle(book.records["one"], "failed", "verification", "bad")
    book.close()
    path = tmp_path / "b" / ledger.FILE
    path.write_bytes(path.read_bytes() + b'{"event": "status", "jo')
    again = ledger.Ledger.open(tmp_path / "b", jobs)
    one, two = again.records["one"], again.records["two"]
    assert one.digest != "" and one.status == "failed" and one.attempts[0].result is not None
    assert (one.attempts[0].result.kind, one.attempts[0].result.notes) == ("verification", ["n"])
    assert two.status == "waiting"
    assert again.records["three"].status == "waiting" and again.began is not None
    again.begin(command="quantize batch")
    assert two.notes == ["its batch was killed while it ran"]
    again.settle(again.records["two"], "published")
    again.finish(1)
    again.close()
    assert not ledger.is_running(tmp_path / "b")
    tomorrow = ledger.Ledger.open(tmp_path / "b", jobs)
    assert {name: record.status for name, record in tomorrow.records.items()} == {
        "one": "waiting", "two": "published", "three": "waiting",
    }  # fmt: skip
    assert tomorrow.began is None and tomorrow.records["one"].first == 1
    tomorrow.close()


def test_a_changed_recipe_has_a_new_chance(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("wrong")
    book = ledger.Ledger.open(tmp_path / "b", [Job("one", recipe, ())])
    book.begin()
    book.records["one"].changed = ("calibration.batch_tokens=1024",)
    book.settle(book.records["one"], "failed", "verification", "wrong")
    book.close()
    for text, status, changed in (("wrong", "failed", ("calibration.batch_tokens=1024",)), ("fixed", "waiting", ())):
        recipe.write_text(text)
        book = ledger.Ledger.open(tmp_path / "b", [Job("one", recipe, ())])
        assert (book.records["one"].status, book.records["one"].changed) == (status, changed)
        book.close()


def test_a_directory_of_someone_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(PipelineError, match="no batch's directory"):
        ledger.Ledger.open(tmp_path, [])
