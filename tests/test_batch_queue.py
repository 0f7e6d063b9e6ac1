"""What becomes of a job whose attempt has ended, class by class, without running anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.executor import Local
from pipeline.batch.job import JobResult
from pipeline.batch.ledger import Ledger
from pipeline.batch.manifest import Job
from pipeline.batch.queue import AGAIN, KILLS, Queue, Rules
from pipeline.batch.record import JobRecord
from pipeline.batch.report import RunInfo
from pipeline.batch.watch import Watch
from pipeline.report.console import Console
from tests.batch_runs import a_plan

Attempts = Callable[..., JobRecord]


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    """Ends attempts of one job with these kinds, one after the other; `plan` and `disk_wait` are the job's."""

    def end(*kinds: str, disk_wait: float = 60.0, stopping: str | None = None, **plan: Any) -> JobRecord:
        ledger = Ledger.open(tmp_path / "batch", [Job("one", tmp_path / "one.yaml", ())])
        queue = Queue(ledger, Local(), Rules(disk_wait=disk_wait), Watch(Console(), RunInfo()))
        ledger.begin()
        queue._stopping = stopping
        record = ledger.records["one"]
        record.plan = a_plan(tmp_path / "out", **plan)
        for kind in kinds:
            assert record.status == "waiting", f"not tried again before {kind}: {record.reason}"
            ledger.start(record, 5.0, False)
            queue._take_result(record, JobResult(kind, 1, f"it was {kind}"))
        ledger.close()
        return record

    return end


def test_memory_runs_out_once(attempts: Attempts) -> None:
    record = attempts("out of memory", "done")
    assert record.status == "published"
    assert record.changed == ("calibration.batch_tokens=1024",)
    assert record.attempts[1].changed == record.changed and record.attempts[0].changed == ()
    assert "started over with batches of 1024 tokens instead of 4096" in record.notes[0]


def test_memory_runs_out_twice(attempts: Attempts) -> None:
    record = attempts("out of memory", "out of memory")
    assert (record.status, record.kind) == ("failed", "out of memory")


def test_memory_runs_out_without_calibration(attempts: Attempts) -> None:
    record = attempts("out of memory", "killed", layers=0)
    assert record.status == "waiting" and record.changed == ("runtime.threads=1",)
    assert "resumed with one thread" in record.notes[0] and "resumed where it stopped" in record.notes[1]


@pytest.mark.parametrize(("kind", "times"), [("killed", KILLS), ("interrupted", KILLS), ("crashed", 1), ("busy", 15)])
def test_what_is_tried_again_how_often(attempts: Attempts, kind: str, times: int) -> None:
    record = attempts(*[kind] * (times + 1))
    assert (record.status, record.kind, len(record.attempts)) == ("failed", kind, times + 1)
    assert record.not_before > AGAIN


@pytest.mark.parametrize("kind", ["recipe", "source", "verification", "too large", "failed"])
def test_what_is_not_tried_again(attempts: Attempts, kind: str) -> None:
    record = attempts(kind)
    assert (record.status, record.kind, record.reason) == ("failed", kind, f"it was {kind}")


def test_a_full_disk(attempts: Attempts) -> None:
    record = attempts("disk", "disk")
    assert (record.status, record.kind) == ("waiting", "disk") and record.notes[0].endswith("it waited for space")


def test_a_full_disk_that_nobody_waits_for(attempts: Attempts) -> None:
    record = attempts("disk", disk_wait=0.0)
    assert (record.status, record.kind) == ("failed", "disk")


@pytest.mark.parametrize("kind", ["interrupted", "late", "killed", "crashed", "busy"])
def test_what_ends_with_its_batch_is_left(attempts: Attempts, kind: str) -> None:
    record = attempts(kind, stopping="window")
    assert (record.status, record.kind) == ("left", "window")
    assert record.count("interrupted") == 0, "a job that was asked to stop is not one that was interrupted"
