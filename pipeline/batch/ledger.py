"""What a batch remembers: DIRECTORY/batch.jsonl, one line per event, appended and flushed; and its lock.

Every change of a job's record is an event. Applying the events one after the other gives the state of every job, so a
batch that was killed goes on with the same command. Until a batch has ended, a result that failed verification stays
failed unless its recipe is changed; in the next run every job that is not published gets a new chance.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.batch.job import JobResult
from pipeline.batch.manifest import Job
from pipeline.batch.record import Attempt, JobRecord, Status
from pipeline.errors import PipelineError

FILE = "batch.jsonl"
KEPT = ("published", "failed", "refused")  # statuses that stay while an interrupted run goes on, until it is planned


@dataclass
class History:
    """What a ledger's events add up to.

    Attributes:
        records: by job.
        began: when the current or the latest run began, in seconds since the epoch.
        ended: when it ended; None: it goes on, or was killed.
        batch: the latest ``batch`` event: what was asked for, and where it runs.
    """

    records: dict[str, JobRecord] = field(default_factory=dict)
    began: float | None = None
    ended: float | None = None
    batch: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> History:
        """Read a ledger's file; lines that a kill cut short are skipped, and a file that is absent is empty."""
        history = cls()
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return history
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            history.apply(entry)
        return history

    def apply(self, entry: dict[str, Any]) -> None:
        """Take one event in."""
        event = entry["event"]
        if event == "batch":
            if self.began is None or self.ended is not None:
                self.began = entry["time"]
                for record in self.records.values():
                    record.begin_run()
            self.ended, self.batch = None, entry
            for name in entry.get("jobs", ()):
                self._record(name)
        elif event == "ended":
            self.ended = entry["time"]
        elif "job" in entry:
            _apply_to(self._record(entry["job"]), entry)

    def _record(self, name: str) -> JobRecord:
        return self.records.setdefault(name, JobRecord(Job(name, Path(), ())))


def _apply_to(record: JobRecord, entry: dict[str, Any]) -> None:
    """Take in an event of one job."""
    match entry["event"]:
        case "start":
            record.status = "running"
            changed = tuple(entry["changed"])
            record.attempts.append(Attempt(entry["began"], entry["forecast"], entry["informed"], changed))
        case "end":
            attempt, result = record.attempts[-1], JobResult(**entry["ending"])
            attempt.ended, attempt.result = entry["ended"], result
            attempt.began = result.began or attempt.began
        case "status":
            record.status, record.kind, record.reason = entry["status"], entry["kind"], entry["reason"]
            record.changed, record.digest = tuple(entry["changed"]), entry["text"]
    if (note := entry.get("note")) is not None:
        record.notes.append(note)


class Ledger:
    """The memory of one batch, locked for as long as it is open.

    Attributes:
        directory: the batch's.
        records: of the jobs that this run was asked for, by name and in their order.
    """

    def __init__(self, directory: Path, file: int, history: History) -> None:
        self.directory = directory
        self._file, self._history = file, history
        self._unwritten = b""

    @classmethod
    def open(cls, directory: Path, jobs: Sequence[Job]) -> Ledger:
        """Lock a batch's directory, making it if need be, and read what happened.

        Args:
            directory: the batch's.
            jobs: what this run is asked for.

        Raises:
            PipelineError: another process runs this batch, or the directory is something else.
        """
        if directory.is_dir() and any(directory.iterdir()) and not (directory / FILE).exists():
            raise PipelineError(f"{directory}: it is no batch's directory", remedy="choose another with --directory")
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(directory / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise PipelineError(
                f"{directory}: this batch is running already; quantize batch --status {directory} shows it"
            ) from None
        _end_last_line(file)
        history = History.read(directory / FILE)
        over = history.ended is not None
        history.records = {job.name: _taken_up(history.records.get(job.name), job, over) for job in jobs}
        if over:
            history.began = None
        return cls(directory, file, history)

    @property
    def records(self) -> dict[str, JobRecord]:
        """See the class's attributes."""
        return self._history.records

    @property
    def began(self) -> float | None:
        """When this run began, in seconds since the epoch; None before `begin`, unless it goes on with an earlier."""
        return self._history.began

    def begin(self, **fields: Any) -> None:
        """Record that a process takes the batch up, for the first time or again; `fields` describe it."""
        self._write("batch", again=self.began is not None, jobs=list(self.records), **fields)
        for record in self.records.values():
            if record.current and record.current[-1].ended is None and record.status == "waiting":
                self.note(record, "its batch was killed while it ran")

    def start(self, record: JobRecord, estimate: float, informed: bool) -> None:
        """Record that an attempt starts; see `Attempt` for the arguments."""
        fields = {"began": time.time(), "forecast": estimate, "informed": informed, "changed": record.changed}
        self._write("start", job=record.name, **fields)

    def end(self, record: JobRecord, result: JobResult) -> None:
        """Record how the attempt under way has ended."""
        self._write("end", job=record.name, ended=time.time(), ending=asdict(result))
        for note in result.notes:
            self.note(record, note)

    def settle(
        self,
        record: JobRecord,
        status: Status,
        kind: str | None = None,
        reason: str | None = None,
        note: str | None = None,
    ) -> None:
        """Record what becomes of a job, with its overrides; see `JobRecord` for the arguments."""
        self._write(
            "status", job=record.name, status=status, kind=kind, reason=reason, note=note, changed=record.changed,
            text=record.digest,
        )  # fmt: skip

    def note(self, record: JobRecord, text: str) -> None:
        """Record something that the report shall say of a job."""
        self._write("note", job=record.name, note=text)

    def finish(self, exit_status: int) -> None:
        """Record that this run is over: nothing waits, or its window has ended."""
        self._write("ended", exit_status=exit_status)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._file)

    def _write(self, event: str, **fields: Any) -> None:
        """Apply an event and append it; where the drive is full it waits in memory for the next one."""
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        self._history.apply(entry)
        self._unwritten += json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
            os.fsync(self._file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise


def _end_last_line(file: int) -> None:
    """A kill may have cut the last line short; what follows must not be glued to it."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


def _taken_up(record: JobRecord | None, job: Job, over: bool) -> JobRecord:
    """A job's record at the start of a process; `over`: the run that it remembers has ended."""
    record = record or JobRecord(job)
    record.job = job
    if over:
        record.begin_run()
    if (digest := recipe_digest(job)) != record.digest and record.digest:  # a changed recipe is another job
        record.status, record.changed = "waiting", ()
    if record.status not in KEPT or (over and record.status != "published"):
        record.status = "waiting"
    if record.status == "waiting":
        record.kind, record.reason = None, None
    record.digest = digest
    return record


def recipe_digest(job: Job) -> str:
    """A digest of a job's recipe and overrides as they are now; it changes when the recipe is edited."""
    digest = hashlib.sha256("\n".join(job.overrides).encode())
    try:
        digest.update(job.recipe.read_bytes())
    except OSError:
        digest.update(b"?")
    return digest.hexdigest()


def is_running(directory: Path) -> bool:
    """Whether a process holds the lock of the batch in `directory` now."""
    try:
        file = os.open(directory / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
