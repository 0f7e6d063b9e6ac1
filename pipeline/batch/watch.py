"""What a person sees of a batch: a live table on a terminal, plain lines in a log, and the same from another shell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch import report
from pipeline.batch.ledger import FILE, History, is_running
from pipeline.batch.planning import JobPlan
from pipeline.batch.progress import Progress
from pipeline.batch.record import Attempt, JobRecord
from pipeline.machine.drives import device_of, drive_space
from pipeline.report.console import Console
from pipeline.report.tables import Column, fitted
from pipeline.units import error_text, size_text, time_text

if TYPE_CHECKING:
    import rich.live
    import rich.table

    from pipeline.batch.queue import Queue

LIVE = "live.json"
PLAIN_INTERVAL = 60.0  # seconds between two lines about a running job in a log
LIVE_INTERVAL = 2.0  # seconds between two versions of live.json
UNHEARD = (OSError, SystemExit)  # rich ends the program where its pipe is closed


class Watch:
    """Tells the user what happens, and keeps live.json and the report up to date."""

    def __init__(self, console: Console, info: report.RunInfo, here: bool = True) -> None:
        """`info` is for the report; `here` says whether jobs run on this machine."""
        self.console, self.info = console, info
        self._word = "started" if here else "submitted"
        self._live: rich.live.Live | None = None
        self._mentioned: dict[str, float] = {}  # when a line was last about a job, by the monotonic clock
        self._written = 0.0
        self._quiet = False

    def say(self, what: str | rich.table.Table) -> None:
        """Print a line or a table; where nobody listens (a closed terminal, a dead pipe) the batch goes on."""
        try:
            if isinstance(what, str):
                self.console.say(what)
            else:
                self.console.rich.print(what)
        except UNHEARD:
            self._go_quiet()

    def _go_quiet(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)  # what is buffered must not raise again at the end
        self._live, self._quiet = None, True

    # --- before ---

    def table(self, queue: Queue) -> None:
        """Show what each job needs, and what all of them need together."""

        def estimate(entry: tuple[JobRecord, JobPlan]) -> str:
            return "" if entry[1].already else time_text(queue.estimator.seconds(entry[1].work))

        columns = [
            Column("job", lambda entry: entry[0].name, right=False),
            Column("source", lambda entry: entry[1].source, rank=5, right=False),
            Column("output", lambda entry: str(entry[1].output), rank=4, right=False),
            Column("size", lambda entry: size_text(entry[1].work.source_bytes), rank=2),
            Column("result", lambda entry: size_text(entry[1].output_bytes), rank=4),
            Column("memory", lambda entry: size_text(entry[1].peak_memory), rank=6),
            Column("disk", lambda entry: size_text(entry[1].disk), rank=3),
            Column("GPU", lambda entry: "yes" if entry[1].gpu else "no", rank=7),
            Column("estimate", estimate, rank=1),
            Column("", lambda entry: _remark(*entry), rank=1, right=False),
        ]
        width = self.console.rich.width
        table = fitted(queue.planned(), columns, width, title="jobs, the largest first")
        self.say(table)
        todo, counts = [plan for _, plan in queue.planned("waiting")], queue.counts()
        together = sum(queue.estimator.seconds(plan.work) for plan in todo)
        known = "" if queue.estimator.informed else ", by a rough rule until the first job has ended"
        self.say(
            f"{len(todo)} to do, {counts['published']} published already, {counts['refused']} refused; "
            f"{time_text(together)} one after the other{known}"
        )
        for line in _disk_lines(todo) if queue.executor.here else ():
            self.say(line)

    # --- during ---

    def started(self, record: JobRecord) -> None:
        """An attempt starts."""
        attempt, number = record.attempts[-1], len(record.current)
        again = f", attempt {number}" if number > 1 else ""
        changed = f", {' '.join(attempt.changed)}" if attempt.changed else ""
        self.say(f"{_clock()} {record.name}: {self._word}{again}{changed}; estimate {time_text(attempt.estimate)}")
        self._mentioned[record.name] = time.monotonic()

    def ended(self, record: JobRecord, attempt: Attempt | None = None) -> None:
        """An attempt has ended; without one, a job is refused, left or published without being run."""
        taken = ""
        if attempt is not None and attempt.seconds is not None:
            seconds = max(attempt.seconds, 1e-3)
            taken = f" after {time_text(seconds)}"
            if record.status == "published" and record.whole:
                taken += f" (estimate {time_text(attempt.estimate)}: {error_text(attempt.estimate, seconds)})"
        why = f" ({record.kind})" if record.kind else ""
        text = f": {record.reason}" if record.reason else ""
        if record.status == "waiting" and record.notes:
            text = f": {record.notes[-1].splitlines()[0]}"
        self.say(f"{_clock()} {record.name}: {record.status}{taken}{why}{text}")

    def now(self, queue: Queue, progress: Mapping[str, Progress]) -> None:
        """From time to time: show and record how far the running jobs are."""
        rows, counts = [_row(queue.ledger.records[name], at) for name, at in progress.items()], queue.counts()
        if time.monotonic() - self._written > LIVE_INTERVAL:
            live = {"time": time.time(), "pid": os.getpid(), "counts": counts, "jobs": rows}
            with suppress(OSError):  # a full drive; the jobs go on
                _write(queue.ledger.directory / LIVE, live)
            self._written = time.monotonic()
        if self._quiet:
            return
        if self.console.rich.is_terminal:
            try:
                self._draw(rows, counts)
            except UNHEARD:
                self._go_quiet()
            return
        for row in rows:
            name = row["name"]
            if time.monotonic() - self._mentioned.get(name, 0.0) >= PLAIN_INTERVAL:
                self.say(f"{_clock()} {name}: {_in_words(row)}")
                self._mentioned[name] = time.monotonic()

    def _draw(self, rows: Sequence[Mapping[str, Any]], counts: Mapping[Any, int]) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self.console.rich, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(live_table(rows, counts, self.console.rich.width), refresh=True)

    def close(self) -> None:
        """Take the live table away."""
        if self._live is not None:
            with suppress(*UNHEARD):
                self._live.stop()
            self._live = None

    # --- the report ---

    def report(self, queue: Queue) -> None:
        """Write the report as it is now; at the end of the run, say so."""
        try:
            _, path = report.write(queue.ledger.directory, report.compose(queue, self.info))
        except OSError as error:
            self.say(f"note: the report cannot be written ({error}); the jobs go on")
            return
        if queue.exit_status is not None:
            self.close()
            self._conclude(queue, path)

    def _conclude(self, queue: Queue, path: Path) -> None:
        self.say(f"{_clock()} {_counts_text(queue.counts())}")
        if (errors := queue.estimator.errors()) is not None:
            self.say(
                f"estimates after the first job were off by {errors['median_error']:.0%} (median of {errors['jobs']}), "
                f"{errors['worst_error']:.0%} at most"
            )
        self.say(f"report: {path}")


def _remark(record: JobRecord, plan: JobPlan) -> str:
    if plan.already:
        return "published already"
    words = []
    if plan.work.done:
        words.append(f"{plan.work.done:.0%} done")
    if plan.to_fetch:
        words.append(f"{size_text(plan.to_fetch)} to download")
    return ", ".join([*words, *record.changed])


def _disk_lines(todo: Sequence[JobPlan]) -> list[str]:
    """A note for each drive without room for all results together: they stay, so the last ones would wait in vain."""
    drives: dict[int, list[JobPlan]] = {}
    for plan in todo:
        drives.setdefault(device_of(plan.output), []).append(plan)
    lines = []
    for plans in drives.values():
        space = drive_space(plans[0].output)
        path, needed, free = space.directory, sum(plan.output_bytes for plan in plans), space.free
        if needed > free:
            lines.append(
                f"note: {path}: all results together need {size_text(needed)}, {size_text(free)} are free; what does "
                "not fit waits for space"
            )
    return lines


def _row(record: JobRecord, at: Progress) -> dict[str, Any]:
    """A running job as live.json holds it."""
    attempt = record.attempts[-1]
    seconds = time.time() - attempt.began
    left = at.left if at.left is not None else max(0.0, attempt.estimate - seconds)
    return {"name": record.name, **asdict(at), "left": left, "seconds": seconds}


def _counts_text(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{number} {status}" for status, number in counts.items() if number)


def live_table(rows: Sequence[Mapping[str, Any]], counts: Mapping[Any, int], width: int) -> rich.table.Table:
    """The running jobs as a table; a narrow terminal gets the most important columns.

    Args:
        rows: the ``jobs`` of live.json.
        counts: how many jobs have which status.
        width: of the terminal, in characters.
    """
    columns = [
        Column("job", lambda row: row["name"], right=False),
        Column("stage", lambda row: row["stage"], rank=4, right=False),
        Column("at", lambda row: row["at"], rank=5, right=False),
        Column("done", lambda row: f"{row['share']:.0%}"),
        Column("rate", lambda row: f"{size_text(row['rate'])}/s" if row["rate"] else "", rank=6),
        Column("left", lambda row: time_text(row["left"]), rank=1),
    ]
    if any(row["device_bytes"] for row in rows):
        columns.append(
            Column("GPU memory", lambda row: size_text(row["device_bytes"]) if row["device_bytes"] else "", rank=3)
        )
    columns += [
        Column("for", lambda row: time_text(row["seconds"]), rank=7),
        Column("host memory", lambda row: size_text(row["rss"]) if row["rss"] else "", rank=8),
    ]
    return fitted(rows, columns, width, caption=_counts_text(counts))


def _in_words(row: Mapping[str, Any]) -> str:
    words = [f"{row['stage']} {row['at']}".strip(), f"{row['share']:.0%}"]
    if row["rate"]:
        words.append(f"{size_text(row['rate'])}/s")
    words.append(f"about {time_text(row['left'])} left")
    if row["device_bytes"]:
        words.append(f"{size_text(row['device_bytes'])} of the GPU")
    return ", ".join(words)


def show_status(directory: Path, console: Console) -> bool:
    """Show the batch of `directory` as another shell sees it; returns False if there is none."""
    if not (directory / FILE).exists():
        return False
    history, alive = History.read(directory / FILE), is_running(directory)
    outputs = report.outputs(directory)
    for name, record in history.records.items():
        seconds = record.attempts[-1].seconds if record.attempts else None
        taken = f" in {time_text(seconds)}" if seconds is not None else ""
        why = f" ({record.kind}): {record.reason.splitlines()[0]}" if record.kind and record.reason else ""
        if record.status != "running":
            place = f": {outputs[name]}" if record.status == "published" and outputs.get(name) else ""
            console.say(f"{name}: {record.status}{taken}{why}{place}")
        elif not alive:
            console.say(f"{name}: stopped with its batch")
    try:
        live = json.loads((directory / LIVE).read_text(encoding="utf-8")) if alive else None
        if live is not None and live["pid"] == history.batch.get("pid"):
            console.rich.print(live_table(live["jobs"], live["counts"], console.rich.width))
    except (OSError, ValueError):
        pass  # it has not been written yet
    if alive:
        state = "running"
    elif history.ended is not None:
        state = f"ended {time.strftime('%Y-%m-%d %H:%M', time.localtime(history.ended))}"
    else:
        command = history.batch.get("command", "the same command")
        state = f"not running: it was killed or stopped; go on with: {command}"
    console.say(f"{directory}: {state}; report: {directory / 'report.html'}")
    return True


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _write(path: Path, data: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data), encoding="utf-8")
    temporary.replace(path)
