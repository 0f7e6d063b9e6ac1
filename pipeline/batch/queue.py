"""A run of a batch from its beginning to its end: what starts when, and what becomes of what fails.

The queue decides; an executor runs. It reads top to bottom: plan every job, refuse what cannot run, then start the
largest that fits, take in what ended, and so on until nothing is left or the window is over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline.batch.executor import Executor, Local
from pipeline.batch.fetch import Fetcher
from pipeline.batch.hooks import Hooks
from pipeline.batch.job import JobRequest, JobResult
from pipeline.batch.ledger import Ledger
from pipeline.batch.planning import JobPlan, Planned, Refusal, plan_all
from pipeline.batch.progress import Progress
from pipeline.batch.record import Attempt, JobRecord, Status, count_statuses
from pipeline.errors import from_os_error
from pipeline.journal import read_identity
from pipeline.machine.processes import signal_name
from pipeline.machine.signals import Stop, stop_on_signals
from pipeline.recipe.recipe import recipe_yaml
from pipeline.run.estimate import Estimator
from pipeline.units import time_text

TICK = 0.1  # seconds between two turns of the loop
WATCH = 1.0  # seconds between two looks at the running jobs
AGAIN = 5.0  # seconds before a job that was killed starts again
LONG_WORK = 300.0  # seconds of work after which a disk that fills up starts a new wait
KILLS = 5  # attempts of a run that may be killed; a job that is always killed must not hold the batch up
BUSY = 15  # times that a job waits two minutes for another process on its output
SMALLEST_BATCH = 256  # tokens
RESTARTS = ("calibration.batch_tokens", "calibration.batches")  # fields of an identity that smaller batches change


@dataclass(frozen=True)
class Rules:
    """What the command line asks of a run.

    Attributes:
        until: when the window ends, in seconds since the epoch; None: no window.
        disk_wait: seconds that a job waits for space on its drive.
        on_failure: a shell command for each job that fails for good.
        on_finish: a shell command at the end.
        fresh: results of other recipes are replaced; results of the same recipe stay.
    """

    until: float | None = None
    disk_wait: float = 7200.0
    on_failure: str | None = None
    on_finish: str | None = None
    fresh: bool = False


class Watcher(Protocol):
    """Shows a batch run to the user while it goes on; `watch.Watch` is it."""

    def say(self, what: Any) -> None:
        """A line, or a table of rich."""

    def table(self, queue: Queue) -> None:
        """The jobs as planned, before the first one starts."""

    def started(self, record: JobRecord) -> None:
        """A job was started."""

    def ended(self, record: JobRecord, attempt: Attempt | None = None) -> None:
        """A job has ended, for now or for good."""

    def now(self, queue: Queue, progress: Mapping[str, Progress]) -> None:
        """How far the running jobs are."""

    def report(self, queue: Queue) -> None:
        """Write the report as it stands."""


class Queue:
    """The jobs of a batch, and the state of its run.

    Attributes:
        estimator: knows what jobs took on this machine.
        exit_status: None while it runs; 0: all is published, 1: something failed, 75: jobs are left for another time.
    """

    def __init__(self, ledger: Ledger, executor: Executor, rules: Rules, watch: Watcher) -> None:
        self.ledger, self.executor, self.rules, self.watch = ledger, executor, rules, watch
        self.estimator = Estimator()
        self.exit_status: int | None = None
        self._stopping: str | None = None  # why: interrupted or window
        self._stop_asked = Stop()
        self._fetcher = Fetcher(ledger.directory)
        self._hooks = Hooks(watch.say)

    @property
    def records(self) -> list[JobRecord]:
        """The batch's jobs, in their order."""
        return list(self.ledger.records.values())

    def planned(self, status: Status | None = None) -> list[tuple[JobRecord, JobPlan]]:
        """The jobs that could be planned, with their plans, the largest first; those of one status if it is given."""
        found = [(r, r.plan) for r in self.records if r.plan is not None and status in (None, r.status)]
        return sorted(found, key=lambda entry: (-entry[1].work.source_bytes, entry[0].name))

    def counts(self) -> dict[Status, int]:
        """How many jobs have which status."""
        return count_statuses(self.records)

    def directory(self, record: JobRecord) -> Path:
        """A job's own directory: its log and its request."""
        return self.ledger.directory / "jobs" / record.name

    # --- planning ---

    def plan(self) -> None:
        """Plan every job; refuse what cannot run."""
        wanted = []
        for record in self.records:
            if record.status == "published" and record.result is not None and not record.result.shared:
                self.watch.ended(record)  # only the node that made it can see it
            else:
                wanted.append(record)
        jobs = [replace(record.job, overrides=(*record.job.overrides, *record.changed)) for record in wanted]
        found = plan_all(jobs, self.ledger.directory, self.executor.here, self.rules.fresh)
        for record in wanted:
            self._take_plan(record, found[record.name])
        for record, plan in self.planned():  # earlier runs of this batch tell how fast the machine is
            self._learn(record, plan)
        self.watch.table(self)

    def _take_plan(self, record: JobRecord, plan: Planned) -> None:
        if isinstance(plan, Refusal):
            if record.status == "published" and plan.kind == "source" and _is_ours(plan.output):
                self.watch.ended(record)  # its source has been removed since
            else:
                self._refuse(record, plan.kind, plan.reason)
            return
        if self.executor.gpu and plan.gpu and plan.work.calibrated:
            plan = plan.with_work(device="cuda")  # what it will run on, wherever it was planned
        if not plan.already and (why := self.executor.refuses(plan)) is not None:
            self._refuse(record, "too large", why)
            return
        record.plan = plan
        if plan.already:
            if record.status != "published":
                self.ledger.settle(record, "published", note="it was published before this run of the batch")
        elif record.status == "failed" and record.kind == "verification":
            self.watch.ended(record)  # it would fail again; with a changed recipe it is another job
        elif record.count("killed", "interrupted", None) > KILLS:
            self._fail(record, "killed", f"it was killed, or its batch, {KILLS + 1} times")
        elif record.status == "published":
            self.ledger.settle(record, "waiting", note="its result is gone; it is made again")
        elif record.status != "waiting":
            self.ledger.settle(record, "waiting")

    def _refuse(self, record: JobRecord, kind: str, reason: str) -> None:
        known = (record.status, record.kind) == ("refused", kind)  # when this run was begun
        self.ledger.settle(record, "refused", kind, reason)
        self.watch.ended(record)
        if not known:
            self._on_failure(record)

    def _learn(self, record: JobRecord, plan: JobPlan) -> None:
        """From a job's last attempt, if that was a whole run."""
        if record.result is not None and record.result.parts is not None:
            self.estimator.learn(plan.work, record.result.parts)

    # --- the run ---

    def run(self) -> int:
        """Run what can be run; returns the exit status."""
        with stop_on_signals() as self._stop_asked:
            self._stop_asked.hold()  # jobs end first; a second signal ends everything
            watched = 0.0
            try:
                while True:
                    for name, result in self.executor.ended():
                        self._take_result(self.ledger.records[name], result)
                    self._check_for_end()
                    self._hooks.check()
                    if self._stopping is None:
                        self._start()
                    if not self.executor.running() and (self._stopping is not None or not self._may_come()):
                        break
                    if time.monotonic() - watched > WATCH:
                        self.watch.now(self, self.executor.progress())
                        watched = time.monotonic()
                    time.sleep(TICK)
            finally:
                self._fetcher.close()
                self.executor.close()
        return self._finish()

    def _may_come(self) -> bool:
        """Whether a job waits that may still start in this window; with nothing running, no estimate changes."""
        return any(self._in_time(plan) for _, plan in self.planned("waiting"))

    def _check_for_end(self) -> None:
        until = self.rules.until
        if (number := self._stop_asked.number) is not None and self._stopping != "interrupted":
            self._stop("interrupted", f"stopping ({signal_name(-number)})")
        elif until is not None and time.time() >= until and self._stopping is None:
            self._stop("window", "the window is over")

    def _stop(self, kind: str, text: str) -> None:
        self._stopping = kind
        self.executor.stop()
        if self.executor.running():
            self.watch.say(f"{text}; {self.executor.running()} running job(s) stop at the end of their unit")

    # --- what starts ---

    def _start(self) -> None:
        """Start what may start, the largest first; what does not fit lets smaller jobs pass."""
        # A job that would not end in time waits for an estimate that the next finished job may improve.
        waiting = [(record, plan) for record, plan in self.planned("waiting") if self._in_time(plan)]
        if isinstance(self.executor, Local):
            plans = [plan for _, plan in waiting]
            self._fetcher.go_on(plans, self.executor.has_room, self.rules.disk_wait)
            self.executor.downloading = self._fetcher.claim
        for record, plan in waiting:
            if time.monotonic() < record.not_before or not self._is_fetched(record, plan):
                continue
            obstacle = self.executor.waits_for(plan)
            if obstacle == "disk":
                self._wait_for_disk(record, plan)
            elif obstacle != "slot":
                record.short_since = None
            if obstacle is None:
                self._start_one(record, plan)

    def _in_time(self, plan: JobPlan) -> bool:
        until = self.rules.until
        return until is None or time.time() + self.estimator.seconds(plan.work) <= until

    def _is_fetched(self, record: JobRecord, plan: JobPlan) -> bool:
        """Whether the source is on this machine; a download that failed for good is the job's failure."""
        if not (self.executor.here and plan.to_fetch):
            return True
        download = self._fetcher.download(plan)
        if download.error is not None:
            self._fail(record, download.kind, download.error)
        return download.done

    def _wait_for_disk(self, record: JobRecord, plan: JobPlan) -> None:
        """Wait for space, up to a limit; the clock runs while no running job could be the cause."""
        if self.executor.running():
            record.short_since = None
            return
        if record.short_since is None:
            record.short_since = time.monotonic()
            self.watch.say(f"{record.name}: waits for space on the drive of {plan.output}")
        if time.monotonic() - record.short_since >= self.rules.disk_wait:
            size, seconds = f"{plan.disk / 1e9:.2f} GB", f"{self.rules.disk_wait:.0f} s"
            reason = f"{plan.output}: its drive had too little space for {size} for {seconds}"
            if record.result is not None and record.result.kind == "disk":
                reason = record.result.reason
            self._fail(record, "disk", reason)

    def _start_one(self, record: JobRecord, plan: JobPlan) -> None:
        estimate = self.estimator.seconds(plan.work)
        request = JobRequest(
            record.name,
            recipe_yaml(plan.recipe),
            record.changed,
            restarts=RESTARTS if record.changed else (),
            until=self.rules.until,
            estimate=estimate,
            cluster=not self.executor.here,
            fresh=self.rules.fresh,
        )
        self.ledger.start(record, estimate, self.estimator.informed)
        try:
            self.executor.start(request, plan, self.directory(record))
        except OSError as error:  # the batch's own drive is full, or no process can be made
            failed = from_os_error(error, f"starting {record.name}")
            self._take_result(record, JobResult(failed.kind, None, str(failed)))
            return
        self.watch.started(record)

    # --- what ends ---

    def _take_result(self, record: JobRecord, result: JobResult) -> None:
        """Record how an attempt ended, and decide what becomes of its job."""
        assert record.plan is not None
        self._keep_log(record, result)
        if self._stopping is not None and result.kind == "interrupted":
            result.kind = "stopped"  # as it was asked to; only those that something else interrupts are limited
        self.ledger.end(record, result)
        record.plan = record.plan.with_work(done=max(record.plan.work.done, result.share))
        self._settle(record, record.plan, result)
        self.watch.ended(record, record.attempts[-1])
        if record.status == "failed":
            self._on_failure(record)
        self.watch.report(self)

    def _settle(self, record: JobRecord, plan: JobPlan, result: JobResult) -> None:
        """What becomes of a job whose attempt has ended: published, failed, left, or waiting for another attempt."""
        match result.kind:
            case "done":
                self.ledger.settle(record, "published")
                attempt = record.attempts[-1]
                if record.whole and attempt.informed and attempt.seconds is not None:
                    self.estimator.judge(attempt.estimate, attempt.seconds)
                self._learn(record, plan)
            case _ if self._stopping is not None and result.kind in ("stopped", "late", "killed", "crashed", "busy"):
                self.ledger.settle(record, "left", self._stopping, result.reason)
            case "late":
                self.ledger.settle(record, "left", "window", result.reason)
            case "out of memory" if not record.changed and record.count("out of memory") <= 1:
                self._try_with_less_memory(record, plan)
            case "disk" if self._may_wait_for_disk(record):
                note = f"{result.reason}; it waited for space"
                self.ledger.settle(record, "waiting", "disk", result.reason, note)
                record.not_before = time.monotonic() + min(60.0, AGAIN * record.count("disk"))
            case "killed" | "interrupted" if record.count("killed", "interrupted", None) <= KILLS:
                self._try_again(record, f"{result.reason}; resumed where it stopped")
            case "busy" if record.count("busy") <= BUSY:
                self._try_again(record, f"{result.reason}; it waited")
            case "crashed" if record.count("crashed") <= 1:
                self._try_again(record, f"it crashed ({result.reason}); resumed once where it stopped")
            case _:
                self.ledger.settle(record, "failed", result.kind, result.reason)

    def _may_wait_for_disk(self, record: JobRecord) -> bool:
        """Whether less than `disk_wait` has passed since the disk first was full without long work in between."""
        now, worked = time.monotonic(), record.attempts[-1].seconds
        if record.full_since is None or (worked is not None and worked > LONG_WORK):
            record.full_since = now
        return now - record.full_since < self.rules.disk_wait

    def _try_again(self, record: JobRecord, note: str) -> None:
        self.ledger.settle(record, "waiting", note=note)
        record.not_before = time.monotonic() + AGAIN

    def _try_with_less_memory(self, record: JobRecord, plan: JobPlan) -> None:
        """With smaller batches, which is another identity and starts over, or with one thread."""
        if plan.work.calibrated:
            tokens = max(min(SMALLEST_BATCH, plan.batch_tokens), plan.batch_tokens // 4)
            record.changed = (f"calibration.batch_tokens={tokens}",)
            record.plan = plan.with_work(done=0.0)
            note = f"memory ran out; started over with batches of {tokens} tokens instead of {plan.batch_tokens}"
        else:
            record.changed = ("runtime.threads=1",)
            note = "memory ran out; resumed with one thread"
        self._try_again(record, note)

    def _keep_log(self, record: JobRecord, result: JobResult) -> None:
        """Append the output of a job on another machine to its log; on this one it is there already."""
        log, result.log = result.log, ""
        if log:
            path = self.directory(record) / "log.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(log)

    def _fail(self, record: JobRecord, kind: str, reason: str) -> None:
        """A job fails for good without an attempt."""
        self.ledger.settle(record, "failed", kind, reason)
        self.watch.ended(record)
        self._on_failure(record)
        self.watch.report(self)

    # --- the end ---

    def _finish(self) -> int:
        for record, plan in self.planned("waiting"):
            reason = "not started"
            if self._stopping is None:
                text = time_text(self.estimator.seconds(plan.work))
                reason = f"it would take about {text}, and not end within the window"
            self.ledger.settle(record, "left", self._stopping or "window", reason)
            self.watch.ended(record)
        counts = self.counts()
        self.exit_status = 1 if counts["failed"] or counts["refused"] else 75 if counts["left"] else 0
        if self._stopping == "interrupted":
            self.exit_status = 75
        else:
            self.ledger.finish(self.exit_status)
        self.watch.report(self)
        self._hooks.start(self.rules.on_finish, self._variables())
        while self._hooks.check():
            time.sleep(TICK)
        return self.exit_status

    def _on_failure(self, record: JobRecord) -> None:
        about = {
            "JOB_NAME": record.name,
            "JOB_CLASS": record.kind or "",
            "JOB_REASON": record.reason or "",
            "JOB_LOG": str(self.directory(record) / "log.txt"),
        }
        self._hooks.start(self.rules.on_failure, {**self._variables(), **about})

    def _variables(self) -> dict[str, str]:
        """What every hook is told; see docs/batch.md."""
        counts = self.counts()
        return {
            "BATCH_NAME": self.ledger.directory.name,
            "BATCH_DIRECTORY": str(self.ledger.directory),
            "BATCH_REPORT": str(self.ledger.directory / "report.html"),
            "BATCH_PUBLISHED": str(counts["published"]),
            "BATCH_FAILED": str(counts["failed"] + counts["refused"]),
            "BATCH_LEFT": str(counts["left"] + counts["waiting"] + counts["running"]),
            "BATCH_EXIT_STATUS": "" if self.exit_status is None else str(self.exit_status),
        }


def _is_ours(output: str | None) -> bool:
    return output is not None and read_identity(Path(output)) is not None
