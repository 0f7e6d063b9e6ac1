"""A night from its beginning to its end: what starts when, what becomes of what fails.

The queue decides; an executor runs. It reads top to bottom: plan every job, refuse what cannot be, then start the
largest that fits, take what ended, and so on until nothing is left or the window is over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from pipeline.batch.executor import Executor, Local
from pipeline.batch.fetch import Fetcher
from pipeline.batch.forecast import Forecaster
from pipeline.batch.job import Asked, Ending
from pipeline.batch.ledger import Attempt, Ledger, Record
from pipeline.batch.manifest import Job
from pipeline.batch.planning import Facts, Planned, Refusal, plan_all
from pipeline.batch.progress import Progress
from pipeline.errors import from_os_error
from pipeline.journal import read_identity
from pipeline.machine.processes import signal_name
from pipeline.units import time_text

TICK = 0.1
WATCH = 1.0  # seconds between two looks at the running jobs
AGAIN = 5.0  # seconds before a job that was killed starts again
LONG_WORK = 300.0  # seconds: a disk that fills up after so much work is another wait
KILLS = 5  # attempts that may be killed in a night; a job that is killed for ever must not hold the batch up
BUSY = 15  # times that a job waits two minutes for another process on its output
SMALLEST_BATCH = 256  # tokens
RETRIED = ("calibration.batch_tokens", "calibration.batches")  # of an identity: what smaller batches change
MOST_TEXT = 8192  # of a variable that a hook is given; the kernel has a limit of its own
HOOK_SECONDS = 60


@dataclass(frozen=True)
class Rules:
    """What the command line asks of a night.

    Attributes:
        until: seconds since the epoch; None: no window.
        disk_wait: seconds that a job waits for space on its drive.
        on_failure: a shell command for each job that fails for good.
        on_finish: a shell command at the end.
    """

    until: float | None = None
    disk_wait: float = 7200.0
    on_failure: str | None = None
    on_finish: str | None = None


class Watcher(Protocol):
    """Who is told what happens."""

    def table(self, queue: Queue) -> None:
        """All jobs have been planned."""

    def started(self, record: Record, facts: Facts, attempt: Attempt) -> None:
        """An attempt starts."""

    def ended(self, record: Record, facts: Facts | None, attempt: Attempt | None) -> None:
        """An attempt has ended, or a job was refused or left."""

    def now(self, queue: Queue, progress: Mapping[str, Progress]) -> None:
        """From time to time."""

    def said(self, text: str) -> None:
        """Something else for the user."""

    def report(self, queue: Queue, exit_status: int | None) -> None:
        """Write the report as it is now."""


@dataclass
class Queue:
    """The state of a night; see the module's text.

    Attributes:
        facts: of the jobs that can run, by name.
        exit_status: once it has ended: 0 all is published, 1 something failed, 75 the rest is for another time.
    """

    jobs: list[Job]
    ledger: Ledger
    executor: Executor
    rules: Rules
    watcher: Watcher
    facts: dict[str, Facts] = field(default_factory=dict)
    forecaster: Forecaster = field(default_factory=Forecaster)
    exit_status: int | None = None
    stopping: str | None = None
    _not_before: dict[str, float] = field(default_factory=dict)
    _short_since: dict[str, float] = field(default_factory=dict)
    _full_since: dict[str, float] = field(default_factory=dict)
    _fetcher: Fetcher | None = None
    _asked: int | None = None  # the signal that came
    _hooks: list[tuple[subprocess.Popen[bytes], str, float]] = field(default_factory=list)

    @property
    def records(self) -> dict[str, Record]:
        """What is remembered of each job."""
        return self.ledger.records

    # --- planning ---

    def plan(self) -> None:
        """Plan every job; refuse what cannot run."""
        wanted = []
        for job in self.jobs:
            last = self.records[job.name].attempts[-1:]
            elsewhere = bool(last) and last[0].ending is not None and not last[0].ending.shared
            if self.records[job.name].status == "published" and elsewhere:
                self.watcher.ended(self.records[job.name], None, None)  # its node alone has it
            else:
                wanted.append(job)
        changed = {job.name: self.records[job.name].changed for job in wanted}
        found = plan_all(wanted, self.ledger.directory, self.executor.here, changed)
        for job in wanted:
            self._planned(self.records[job.name], found[job.name])
        for name, facts in self.facts.items():  # earlier nights of this batch tell how fast the machine is
            self._learn(self.records[name], facts)
        self.watcher.table(self)

    def _planned(self, record: Record, planned: Planned) -> None:
        name = record.job.name
        if isinstance(planned, Refusal):
            if record.status == "published" and planned.kind == "source" and _is_ours(planned.output):
                self.watcher.ended(record, None, None)  # its source has been removed since
                return
            self._refuse(record, planned.kind, planned.reason)
            return
        if self.executor.gpu and planned.gpu and planned.layers:
            planned = replace(planned, device="cuda")  # what it will run on, wherever it was planned
        if not planned.already and (why := self.executor.refuses(planned)) is not None:
            self._refuse(record, "too large", why)
            return
        self.facts[name] = planned
        if planned.already:
            if record.status != "published":
                self.ledger.settle(name, "published", note="it was published before this run of the batch")
        elif record.status == "failed" and record.kind == "verification":
            self.watcher.ended(record, planned, None)  # it would fail again; mended, it is another job
        elif record.count("killed", "interrupted", None) > KILLS:
            self.ledger.settle(name, "failed", "killed", f"it was killed, or its batch, {KILLS + 1} times")
            self._failed(name)
        elif record.status == "published":
            self.ledger.settle(name, "waiting", note="its result is gone; it is made again")
        elif record.status != "waiting":
            self.ledger.settle(name, "waiting")

    def _refuse(self, record: Record, kind: str, reason: str) -> None:
        known = (record.status, record.kind) == ("refused", kind)  # when this night was begun
        self.ledger.settle(record.job.name, "refused", kind, reason)
        self.watcher.ended(record, None, None)
        if not known:
            self._on_failure(record)

    def _learn(self, record: Record, facts: Facts) -> None:
        """From a job's last attempt, if that was a whole run."""
        ending = record.attempts[-1].ending if record.attempts else None
        if ending is not None and ending.parts is not None:
            self.forecaster.learn(facts, ending.parts)

    # --- the night ---

    def run(self) -> int:
        """Run what can be run; returns the exit status."""
        with self._signals(), Fetcher(self.ledger.directory, self._room_for_download) as fetcher:
            self._fetcher = fetcher
            watched = 0.0
            try:
                while True:
                    for name, ending in self.executor.ended():
                        self._ended(name, ending)
                    self._look_up()
                    self._look_after_hooks()
                    if self.stopping is None:
                        self._start()
                    if not self.executor.running() and (self.stopping is not None or not self._may_come()):
                        break
                    if time.monotonic() - watched > WATCH:
                        self.watcher.now(self, self.executor.progress())
                        watched = time.monotonic()
                    time.sleep(TICK)
            finally:
                self.executor.close()
        return self._finish()

    def _may_come(self) -> bool:
        """Whether a job waits that may still start in this window; with nothing running, no forecast changes."""
        return any(self.records[name].status == "waiting" and self._in_time(name) for name in self.facts)

    def _look_up(self) -> None:
        until = self.rules.until
        if self._asked is not None and self.stopping != "interrupted":
            self._stop("interrupted", f"stopping ({signal_name(-self._asked)})")
        elif until is not None and time.time() >= until and self.stopping is None:
            self._stop("window", "the window is over")

    def _stop(self, kind: str, text: str) -> None:
        self.stopping = kind
        self.executor.stop()
        if self.executor.running():
            self.watcher.said(f"{text}; {self.executor.running()} running job(s) stop at the end of their unit")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP stop the jobs cleanly; a second one ends them."""

        def asked(number: int, frame: Any) -> None:
            if self._asked is not None:
                raise KeyboardInterrupt
            self._asked = number

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, asked) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- what starts ---

    def _start(self) -> None:
        """Start what may start, the largest first; what does not fit lets smaller ones pass."""
        assert self._fetcher is not None
        order = sorted(
            (name for name in self.facts if self.records[name].status == "waiting"),
            key=lambda name: (-self.facts[name].source_bytes, name),
        )
        if self.executor.here:
            self._fetcher.wants([self.facts[name] for name in order if self._in_time(name)], self.rules.disk_wait)
            if isinstance(self.executor, Local):
                self.executor.downloading = self._fetcher.claim()
        for name in order:
            facts = self.facts[name]
            if not self._in_time(name):  # by a forecast that the next finished job may better
                continue
            if time.monotonic() < self._not_before.get(name, 0.0):
                continue
            if self.executor.here and facts.to_fetch and not self._fetched(name, facts):
                continue
            why = self.executor.wants(facts)
            if why == "slot":
                continue
            if why == "disk":
                self._short_of_disk(name, facts)
                continue
            self._short_since.pop(name, None)
            if why is None:
                self._start_one(name, facts)

    def _in_time(self, name: str) -> bool:
        until = self.rules.until
        return until is None or time.time() + self.forecaster.seconds(self.facts[name]) <= until

    def _room_for_download(self, place: Path, nbytes: int) -> bool:
        return not isinstance(self.executor, Local) or self.executor.has_room(place, nbytes)

    def _fetched(self, name: str, facts: Facts) -> bool:
        """Whether a hub's checkpoint is in the cache; a download that failed for good is the job's failure."""
        assert self._fetcher is not None
        state = self._fetcher.state(facts)
        if state.error is not None:
            self.ledger.settle(name, "failed", state.kind, state.error)
            self._failed(name)
        return state.done

    def _short_of_disk(self, name: str, facts: Facts) -> None:
        """Wait for space, up to a limit; the clock runs while no running job could be the cause."""
        if self.executor.running():
            self._short_since.pop(name, None)
            return
        since = self._short_since.setdefault(name, time.monotonic())
        if since > time.monotonic() - TICK:
            self.watcher.said(f"{name}: waits for space on the drive of {facts.output}")
        if time.monotonic() - since >= self.rules.disk_wait:
            last = self.records[name].attempts[-1:]
            reason = last[0].ending.reason if last and last[0].ending and last[0].ending.kind == "disk" else (
                f"{facts.output}: its drive had too little space for {facts.disk / 1e9:.2f} GB for "
                f"{self.rules.disk_wait:.0f} s"
            )  # fmt: skip
            self.ledger.settle(name, "failed", "disk", reason)
            self._failed(name)

    def _start_one(self, name: str, facts: Facts) -> None:
        record = self.records[name]
        forecast = self.forecaster.seconds(facts)
        attempt = Attempt(time.time(), forecast, self.forecaster.informed, record.changed)
        asked = Asked(
            name,
            facts.text,
            record.changed,
            restarts=RETRIED if record.changed else (),
            until=self.rules.until,
            forecast=forecast,
            cluster=not self.executor.here,
        )
        self.ledger.start(name, attempt)
        try:
            self.executor.start(asked, facts, self.place(name))
        except OSError as error:  # the batch's own drive is full, or no process can be made
            failed = from_os_error(error, f"starting {name}")
            self._ended(name, Ending(failed.kind, None, str(failed)))
            return
        self.watcher.started(record, facts, attempt)

    def place(self, name: str) -> Path:
        """A job's own directory: its log, and what it was asked."""
        return self.ledger.directory / "jobs" / name

    # --- what ends ---

    def _ended(self, name: str, ending: Ending) -> None:
        record, facts = self.records[name], self.facts[name]
        self._keep_log(name, ending)
        if self.stopping is not None and ending.kind == "interrupted":
            ending.kind = "stopped"  # as it was asked to: no preemption, which a night has a limit for
        self.ledger.end(name, ending)
        attempt = record.attempts[-1]
        for note in ending.notes:
            self.ledger.note(name, note)
        self.facts[name] = facts = replace(facts, done=max(facts.done, ending.share))
        match ending.kind:
            case "done":
                self.ledger.settle(name, "published")
                if record.whole and attempt.informed and attempt.ended is not None:
                    self.forecaster.judge(attempt.forecast, attempt.ended - attempt.began)
                self._learn(record, replace(facts, done=0.0))
            case _ if self.stopping is not None and ending.kind in ("stopped", "late", "killed", "crashed", "busy"):
                self.ledger.settle(name, "left", self.stopping, ending.reason)
            case "late":
                self.ledger.settle(name, "left", "window", ending.reason)
            case "out of memory":
                self._smaller(name, record, facts, ending)
            case "disk":
                self._disk_was_full(name, record, ending)
            case "killed" | "interrupted" if record.count("killed", "interrupted", None) <= KILLS:
                self._again(name, f"{ending.reason}; resumed where it stopped")
            case "busy" if record.count("busy") <= BUSY:
                self._again(name, f"{ending.reason}; it waited")
            case "crashed" if record.count("crashed") <= 1:
                self._again(name, f"it crashed ({ending.reason}); resumed once where it stopped")
            case _:
                self._fail(name, ending)
        self.watcher.ended(record, facts, attempt)
        if record.status == "failed":
            self._on_failure(record)
        self.watcher.report(self, None)

    def _disk_was_full(self, name: str, record: Record, ending: Ending) -> None:
        """Wait for space, from the first time that it ran out without long work in between."""
        attempt, now = record.attempts[-1], time.monotonic()
        if attempt.ended is not None and attempt.ended - attempt.began > LONG_WORK:
            self._full_since.pop(name, None)
        if now - self._full_since.setdefault(name, now) >= self.rules.disk_wait:
            self._fail(name, ending)
            return
        self.ledger.settle(name, "waiting", "disk", ending.reason, f"{ending.reason}; it waited for space")
        self._not_before[name] = now + min(60.0, AGAIN * record.count("disk"))

    def _again(self, name: str, note: str) -> None:
        self.ledger.settle(name, "waiting", note=note)
        self._not_before[name] = time.monotonic() + AGAIN

    def _smaller(self, name: str, record: Record, facts: Facts, ending: Ending) -> None:
        """Once more with less memory; with other batches it is another identity, and starts over."""
        if record.changed or record.count("out of memory") > 1:
            self._fail(name, ending)
            return
        if facts.layers:
            tokens = max(min(SMALLEST_BATCH, facts.batch_tokens), facts.batch_tokens // 4)
            record.changed = (f"calibration.batch_tokens={tokens}",)
            self.facts[name] = replace(facts, done=0.0)
            note = f"memory ran out; started over with batches of {tokens} tokens instead of {facts.batch_tokens}"
        else:
            record.changed = ("runtime.threads=1",)
            note = "memory ran out; resumed with one thread"
        self._again(name, note)

    def _fail(self, name: str, ending: Ending) -> None:
        self.ledger.settle(name, "failed", ending.kind, ending.reason)

    def _failed(self, name: str) -> None:
        record = self.records[name]
        self.watcher.ended(record, self.facts[name], None)
        self._on_failure(record)
        self.watcher.report(self, None)

    def _keep_log(self, name: str, ending: Ending) -> None:
        """What a job on another machine said; on this one it is in the log already."""
        log, ending.log = ending.log, ""
        if log:
            path = self.place(name) / "log.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(log)

    # --- the end ---

    def _finish(self) -> int:
        for name, facts in self.facts.items():
            if self.records[name].status in ("waiting", "running"):
                reason = "not started"
                if self.stopping is None:
                    text = time_text(self.forecaster.seconds(facts))
                    reason = f"it would take about {text}, and not end within the window"
                self.ledger.settle(name, "left", self.stopping or "window", reason)
                self.watcher.ended(self.records[name], facts, None)
        statuses = [record.status for record in self.records.values()]
        failed = any(status in ("failed", "refused") for status in statuses)
        self.exit_status = 1 if failed else 75 if "left" in statuses else 0
        if self.stopping == "interrupted":
            self.exit_status = 75
        else:
            self.ledger.finish(self.exit_status)
        self.watcher.report(self, self.exit_status)
        self._hook(self.rules.on_finish, {})
        deadline = time.monotonic() + HOOK_SECONDS
        while self._hooks and time.monotonic() < deadline + 1:
            self._look_after_hooks()
            time.sleep(TICK)
        return self.exit_status

    def counts(self) -> dict[str, int]:
        """How many jobs have which status."""
        found = dict.fromkeys(("published", "failed", "refused", "left", "running", "waiting"), 0)
        for record in self.records.values():
            found[record.status] += 1
        return found

    def _on_failure(self, record: Record) -> None:
        self._hook(
            self.rules.on_failure,
            {
                "JOB_NAME": record.job.name,
                "JOB_CLASS": record.kind or "",
                "JOB_REASON": record.reason or "",
                "JOB_LOG": str(self.place(record.job.name) / "log.txt"),
            },
        )

    def _hook(self, command: str | None, more: Mapping[str, str]) -> None:
        """Start a command of the user's; what it does is no reason to fail, and it does not hold the night up."""
        if not command:
            return
        counts = self.counts()
        environment = {
            **os.environ,
            "BATCH_NAME": self.ledger.directory.name,
            "BATCH_DIRECTORY": str(self.ledger.directory),
            "BATCH_REPORT": str(self.ledger.directory / "report.html"),
            "BATCH_PUBLISHED": str(counts["published"]),
            "BATCH_FAILED": str(counts["failed"] + counts["refused"]),
            "BATCH_LEFT": str(counts["left"] + counts["waiting"] + counts["running"]),
            "BATCH_EXIT_STATUS": "" if self.exit_status is None else str(self.exit_status),
            **{key: value.replace("\0", " ")[:MOST_TEXT] for key, value in more.items()},
        }
        try:
            process = subprocess.Popen(
                command,
                shell=True,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self.watcher.said(f"note: {command!r} could not be run: {error}")
            return
        self._hooks.append((process, command, time.monotonic() + HOOK_SECONDS))

    def _look_after_hooks(self) -> None:
        """Say how hooks ended, and end those that take too long, with what they started."""
        for entry in list(self._hooks):
            process, command, deadline = entry
            status = process.poll()
            if status is None and time.monotonic() < deadline:
                continue
            self._hooks.remove(entry)
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.watcher.said(f"note: {command!r} took more than {HOOK_SECONDS} s and was ended")
            elif status:
                self.watcher.said(f"note: {command!r} ended with status {status}")


def _is_ours(output: str | None) -> bool:
    return output is not None and read_identity(Path(output)) is not None
