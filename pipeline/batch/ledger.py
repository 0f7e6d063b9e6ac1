"""What a batch remembers: DIRECTORY/batch.jsonl, one line an event, appended and flushed; and its lock.

Folding the lines gives the state of every job, so a batch that is killed goes on with the same command. Until a batch
has ended, a result that failed verification stays failed, unless its recipe was mended; the next night every job that
is not published has a new chance.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.batch.job import Ending
from pipeline.batch.manifest import Job
from pipeline.errors import PipelineError

FILE = "batch.jsonl"
KEPT = ("published", "failed", "refused")  # of a night that goes on, until it is planned again
Status = Literal["waiting", "running", "published", "failed", "refused", "left"]


@dataclass
class Attempt:
    """One process of a job.

    Attributes:
        began: seconds since the epoch.
        forecast: seconds that it was thought to take.
        informed: the forecast knew a finished job of this machine.
        changed: overrides of a retry.
        ended: seconds since the epoch; None while it runs, or if its batch was killed.
        ending: how.
    """

    began: float
    forecast: float
    informed: bool
    changed: tuple[str, ...]
    ended: float | None = None
    ending: Ending | None = None


@dataclass
class Record:
    """What is remembered of a job.

    Attributes:
        job: what the command line named.
        status: of this night.
        kind: the class of a failure.
        reason: of a failure, or of being left.
        notes: what happened to it, for the report.
        attempts: of this night and earlier ones.
        changed: overrides that it is retried with; they stay.
        tonight: where the attempts of this night begin.
        text: the digest of its recipe and overrides when it failed for good.
    """

    job: Job
    status: Status = "waiting"
    kind: str | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    changed: tuple[str, ...] = ()
    tonight: int = 0
    text: str = ""

    def count(self, *kinds: str | None) -> int:
        """How many attempts of this night ended so; None: with their batch, without an ending."""
        return sum((a.ending.kind if a.ending else None) in kinds for a in self.attempts[self.tonight :])

    @property
    def whole(self) -> bool:
        """Whether the last attempt did all of the work: the times of a resumed one say little."""
        last = self.attempts[-1].ending if self.attempts else None
        return last is not None and last.parts is not None


class Ledger:
    """The memory of one batch, locked for as long as it is open."""

    def __init__(self, directory: Path, file: int) -> None:
        self.directory = directory
        self.records: dict[str, Record] = {}
        self.began: float | None = None
        self._file = file
        self._unwritten = b""

    @classmethod
    def open(cls, directory: Path, jobs: Sequence[Job]) -> Ledger:
        """Lock a batch's directory, making it if need be, and read what happened.

        Raises:
            PipelineError: another process runs this batch, or the directory is something else.
        """
        if directory.is_dir() and any(directory.iterdir()) and not (directory / FILE).exists():
            raise PipelineError(f"{directory}: it is no batch's directory; choose another with --directory")
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(directory / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise PipelineError(
                f"{directory}: this batch is running already; quantize batch --status {directory} shows it"
            ) from None
        ledger = cls(directory, file)
        ledger._end_last_line()
        ledger._read(jobs)
        return ledger

    def _end_last_line(self) -> None:
        """A kill may have torn the last line; what follows must not be glued to it."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def _read(self, jobs: Sequence[Job]) -> None:
        night = fold(self.directory / FILE)
        over = night.ended is not None
        for job in jobs:
            record = night.records.get(job.name) or Record(job)
            record.job = job
            if over:
                record.tonight, record.notes = len(record.attempts), []
            if (text := job_text(job)) != record.text and record.text:  # a mended recipe is another job
                record.status, record.kind, record.reason, record.changed = "waiting", None, None, ()
            if record.status not in KEPT or (over and record.status != "published"):
                record.status, record.kind, record.reason = "waiting", None, None
            record.text = text
            self.records[job.name] = record
        self.began = None if over else night.began

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; where the drive is full it waits in memory for the next one."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, separators=(",", ":"))
        self._unwritten += line.encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
            os.fsync(self._file)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def note(self, name: str, text: str) -> None:
        """Something that the report shall say of a job."""
        self.records[name].notes.append(text)
        self.write("note", job=name, note=text)

    def begin(self, **fields: Any) -> None:
        """A process takes the batch up, for the first time or again."""
        again = self.began is not None
        self.began = self.began or time.time()
        self.write("batch", again=again, jobs=list(self.records), **fields)
        for name, record in self.records.items():
            last = record.attempts[-1:] if len(record.attempts) > record.tonight else []
            if last and last[0].ended is None and record.status == "waiting":
                self.note(name, "its batch was killed while it ran")

    def start(self, name: str, attempt: Attempt) -> None:
        """An attempt starts."""
        record = self.records[name]
        record.attempts.append(attempt)
        record.status = "running"
        fields = asdict(attempt)
        self.write("start", job=name, **{key: fields[key] for key in ("began", "forecast", "informed", "changed")})

    def end(self, name: str, ending: Ending) -> None:
        """The attempt under way has ended."""
        attempt = self.records[name].attempts[-1]
        attempt.ended, attempt.ending = time.time(), ending
        attempt.began = ending.began or attempt.began
        self.write("end", job=name, ended=attempt.ended, ending=asdict(ending))

    def settle(
        self, name: str, status: Status, kind: str | None = None, reason: str | None = None, note: str | None = None
    ) -> None:
        """What becomes of a job."""
        record = self.records[name]
        record.status, record.kind, record.reason = status, kind, reason
        if note is not None:
            record.notes.append(note)
        self.write(
            "status", job=name, status=status, kind=kind, reason=reason, note=note, changed=record.changed,
            text=record.text,
        )  # fmt: skip

    def finish(self, exit_status: int) -> None:
        """The night is over: nothing waits, or its window is."""
        self.write("ended", exit_status=exit_status)

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._file)


@dataclass
class Night:
    """What a ledger's file says.

    Attributes:
        records: by job.
        began: when the night did that is under way, or was last.
        ended: when; None: it goes on, or was killed.
        batch: the last ``batch`` event: what was asked, where it runs.
    """

    records: dict[str, Record] = field(default_factory=dict)
    began: float | None = None
    ended: float | None = None
    batch: dict[str, Any] = field(default_factory=dict)


def fold(path: Path) -> Night:
    """Read a ledger; lines that a kill tore are passed over."""
    night = Night()
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return night
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        event = entry["event"]
        if event == "batch":
            if night.began is None or night.ended is not None:
                night.began = entry["time"]
                for record in night.records.values():
                    record.tonight, record.notes = len(record.attempts), []
            night.ended, night.batch = None, entry
            for name in entry.get("jobs", ()):
                night.records.setdefault(name, Record(Job(name, Path(), ())))
        elif event == "ended":
            night.ended = entry["time"]
        elif "job" in entry:
            name = entry["job"]
            record = night.records.setdefault(name, Record(Job(name, Path(), ())))
            _take(record, entry)
    return night


def _take(record: Record, entry: dict[str, Any]) -> None:
    match entry["event"]:
        case "start":
            record.status = "running"
            record.attempts.append(
                Attempt(entry["began"], entry["forecast"], entry["informed"], tuple(entry["changed"]))
            )
        case "end":
            record.attempts[-1].ended = entry["ended"]
            record.attempts[-1].ending = ending = Ending(**entry["ending"])
            record.attempts[-1].began = ending.began or record.attempts[-1].began
        case "status":
            record.status, record.kind, record.reason = entry["status"], entry["kind"], entry["reason"]
            record.changed, record.text = tuple(entry["changed"]), entry["text"]
            if entry["note"] is not None:
                record.notes.append(entry["note"])
        case "note":
            record.notes.append(entry["note"])


def job_text(job: Job) -> str:
    """What a job's recipe says by now, as a digest: a recipe that was mended is another job."""
    import hashlib

    digest = hashlib.sha256("\n".join(job.overrides).encode())
    try:
        digest.update(job.recipe.read_bytes())
    except OSError:
        digest.update(b"?")
    return digest.hexdigest()


def is_running(directory: Path) -> bool:
    """Whether a process holds a batch's lock now."""
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
