"""Everything that a batch knows of one job: what was asked for, its plan, its attempts, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.batch.job import JobResult
from pipeline.batch.manifest import Job
from pipeline.batch.planning import JobPlan

Status = Literal["waiting", "running", "published", "failed", "refused", "left"]
STATUSES: tuple[Status, ...] = ("published", "failed", "refused", "left", "running", "waiting")  # as they are reported


@dataclass
class Attempt:
    """One process of a job.

    Attributes:
        began: seconds since the epoch.
        estimate: seconds that it was expected to take.
        informed: the estimate knew a finished job of this machine.
        changed: overrides of a retry.
        ended: seconds since the epoch; None while it runs, or if its batch was killed.
        result: how it ended; None as long as `ended` is.
    """

    began: float
    estimate: float
    informed: bool
    changed: tuple[str, ...]
    ended: float | None = None
    result: JobResult | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took; None if it has not ended."""
        return None if self.ended is None else self.ended - self.began


@dataclass
class JobRecord:
    """A job of a batch. All but the plan and the clocks at the end is read back from the ledger.

    Attributes:
        job: what the command line named.
        status: in this run of the batch.
        kind: the class of a failure.
        reason: of a failure, or of being left.
        notes: what happened to it in this run, for the report.
        attempts: of this run and of earlier ones.
        first: the index of this run's first attempt.
        changed: overrides that it is retried with; they stay.
        digest: of its recipe and overrides; see `ledger.recipe_digest`.
        plan: None before it is planned, and for a job that cannot be planned.
        not_before: the time, by the monotonic clock, before which it does not start again.
        short_since: since when it has waited for disk space before it started, by the monotonic clock.
        full_since: since when its attempts have failed because the disk was full, by the monotonic clock.
    """

    job: Job
    status: Status = "waiting"
    kind: str | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    first: int = 0
    changed: tuple[str, ...] = ()
    digest: str = ""
    plan: JobPlan | None = None
    not_before: float = 0.0
    short_since: float | None = None
    full_since: float | None = None

    @property
    def name(self) -> str:
        """Its name, unique in the batch."""
        return self.job.name

    @property
    def current(self) -> list[Attempt]:
        """The attempts of this run of the batch."""
        return self.attempts[self.first :]

    @property
    def result(self) -> JobResult | None:
        """How the last attempt ended, in this run or an earlier one."""
        return self.attempts[-1].result if self.attempts else None

    @property
    def whole(self) -> bool:
        """Whether the last attempt did all of the work: the times of a resumed one say little."""
        return self.result is not None and self.result.parts is not None

    def begin_run(self) -> None:
        """Leave the attempts and notes of earlier runs behind."""
        self.first, self.notes = len(self.attempts), []

    def count(self, *kinds: str | None) -> int:
        """How many attempts of this run ended with one of these kinds; None: without a result, with their batch."""
        return sum((attempt.result.kind if attempt.result else None) in kinds for attempt in self.current)


def count_statuses(records: Iterable[JobRecord]) -> dict[Status, int]:
    """How many jobs have which status."""
    found = dict.fromkeys(STATUSES, 0)
    for record in records:
        found[record.status] += 1
    return found
