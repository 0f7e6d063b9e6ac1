"""What a person sees of a batch: a live table on a terminal, plain lines in a log, and the same from another shell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch import morning
from pipeline.batch.ledger import FILE, Attempt, Record, fold, is_running
from pipeline.batch.planning import Facts
from pipeline.batch.progress import Progress
from pipeline.machine.drives import existing
from pipeline.report import batch as page
from pipeline.report.console import Console
from pipeline.units import size_text, time_text

if TYPE_CHECKING:
    import rich.live
    import rich.table

    from pipeline.batch.queue import Queue

LIVE = "live.json"
PLAIN_INTERVAL = 60.0  # seconds between two lines on a running job in a log
LIVE_INTERVAL = 2.0
UNHEARD = (OSError, SystemExit)  # rich ends the program where its pipe is closed


class Watch:
    """Tells what happens, and keeps live.json and the report up to date."""

    def __init__(self, console: Console, night: dict[str, Any], here: bool = True) -> None:
        self.console, self.night = console, night
        self._word = "started" if here else "submitted"
        self._live: rich.live.Live | None = None
        self._told: dict[str, float] = {}
        self._written = 0.0
        self._quiet = False

    def _say(self, what: Any) -> None:
        """A line or a table; where nobody listens any more (a closed terminal, a dead pipe) the night goes on."""
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
            os.dup2(null, stream)  # what is buffered shall not raise again at the end
        self._live, self._quiet = None, True

    # --- before ---

    def table(self, queue: Queue) -> None:
        """What each job needs, and what all of them need together."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="jobs, the largest first", title_justify="left")
        for name in ("job", "source", "size", "result", "memory", "disk", "GPU", "forecast", ""):
            right = name in ("size", "result", "memory", "disk", "forecast")
            table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
        for name, facts in sorted(queue.facts.items(), key=lambda entry: -entry[1].source_bytes):
            seconds = "" if facts.already else time_text(queue.forecaster.seconds(facts))
            table.add_row(
                escape(name), escape(facts.source), size_text(facts.source_bytes), size_text(facts.output_bytes),
                size_text(facts.peak_memory), size_text(facts.disk), "yes" if facts.gpu else "no", seconds,
                escape(self._remark(queue, name, facts)),
            )  # fmt: skip
        self._say(table)
        todo = [f for name, f in queue.facts.items() if queue.records[name].status == "waiting"]
        counts = queue.counts()
        together = sum(queue.forecaster.seconds(facts) for facts in todo)
        known = "" if queue.forecaster.informed else ", by a rough rule until the first job has ended"
        self._say(
            f"{len(todo)} to do, {counts['published']} published already, {counts['refused']} refused; "
            f"{time_text(together)} one after the other{known}"
        )
        for line in _disk_lines(todo) if queue.executor.here else ():
            self._say(line)

    def _remark(self, queue: Queue, name: str, facts: Facts) -> str:
        if facts.already:
            return "published already"
        words = []
        if facts.done:
            words.append(f"{facts.done:.0%} done")
        if facts.to_fetch:
            words.append(f"{size_text(facts.to_fetch)} to download")
        words += queue.records[name].changed
        return ", ".join(words)

    # --- during ---

    def started(self, record: Record, facts: Facts, attempt: Attempt) -> None:
        """See `queue.Watcher`."""
        number = len(record.attempts) - record.tonight
        again = f", attempt {number}" if number > 1 else ""
        changed = f", {' '.join(attempt.changed)}" if attempt.changed else ""
        self._say(f"{_clock()} {record.job.name}: {self._word}{again}{changed}; forecast {time_text(attempt.forecast)}")
        self._told[record.job.name] = time.monotonic()

    def ended(self, record: Record, facts: Facts | None, attempt: Attempt | None) -> None:
        """See `queue.Watcher`."""
        name, told = record.job.name, ""
        if attempt is not None and attempt.ended is not None:
            taken = max(attempt.ended - attempt.began, 1e-3)
            told = f" after {time_text(taken)}"
            if record.status == "published" and record.whole:
                told += f" (forecast {time_text(attempt.forecast)}, {attempt.forecast / taken - 1:+.0%})"
        why = f" ({record.kind})" if record.kind else ""
        text = f": {record.reason}" if record.reason else ""
        if record.status == "waiting" and record.notes:
            text = f": {record.notes[-1].splitlines()[0]}"
        self._say(f"{_clock()} {name}: {record.status}{told}{why}{text}")

    def now(self, queue: Queue, progress: Mapping[str, Progress]) -> None:
        """See `queue.Watcher`."""
        rows = _rows(queue, progress)
        if time.monotonic() - self._written > LIVE_INTERVAL:
            live = {"time": time.time(), "pid": os.getpid(), "counts": queue.counts(), "jobs": rows}
            with suppress(OSError):  # a full drive; the jobs go on
                _write(queue.ledger.directory / LIVE, live)
            self._written = time.monotonic()
        if self._quiet:
            return
        if self.console.rich.is_terminal:
            try:
                self._draw(rows, queue.counts())
            except UNHEARD:
                self._go_quiet()
            return
        for row in rows:
            name = row["name"]
            if time.monotonic() - self._told.get(name, 0.0) >= PLAIN_INTERVAL:
                self._say(f"{_clock()} {name}: {_in_words(row)}")
                self._told[name] = time.monotonic()

    def _draw(self, rows: list[dict[str, Any]], counts: Mapping[str, int]) -> None:
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

    def said(self, text: str) -> None:
        """See `queue.Watcher`."""
        self._say(text)

    # --- the report ---

    def report(self, queue: Queue, exit_status: int | None) -> None:
        """See `queue.Watcher`."""
        night = {
            **self.night,
            "began": queue.ledger.began,
            "ended": None if exit_status is None else time.time(),
            "until": queue.rules.until,
            "exit_status": exit_status,
            "counts": queue.counts(),
            "forecast": queue.forecaster.errors(),
        }
        made = morning.compose(queue.ledger.directory, queue.records, queue.facts, night)
        try:
            _, path = page.write(queue.ledger.directory, made)
        except OSError as error:
            self._say(f"note: the report cannot be written ({error}); the jobs go on")
            return
        if exit_status is not None:
            self.close()
            self._conclude(queue, path)

    def _conclude(self, queue: Queue, path: Path) -> None:
        counts = queue.counts()
        said = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
        self._say(f"{_clock()} {said}")
        if (errors := queue.forecaster.errors()) is not None:
            self._say(
                f"forecasts after the first job were off by {errors['median_error']:.0%} (median of {errors['jobs']}), "
                f"{errors['worst_error']:.0%} at most"
            )
        self._say(f"report: {path}")


def _disk_lines(todo: list[Facts]) -> list[str]:
    """Drives on which all results together have no room: results stay, so the last ones would wait in vain."""
    import shutil

    drives: dict[int, list[Facts]] = {}
    for facts in todo:
        drives.setdefault(existing(Path(facts.output)).stat().st_dev, []).append(facts)
    lines = []
    for group in drives.values():
        place = existing(Path(group[0].output))
        needed, free = sum(facts.output_bytes for facts in group), shutil.disk_usage(place).free
        if needed > free:
            lines.append(
                f"note: {place}: all results together need {size_text(needed)}, {size_text(free)} are free; what does "
                "not fit waits for space"
            )
    return lines


def _rows(queue: Queue, progress: Mapping[str, Progress]) -> list[dict[str, Any]]:
    rows = []
    for name, at in progress.items():
        began, forecast = queue.records[name].attempts[-1].began, queue.records[name].attempts[-1].forecast
        left = at.left if at.left is not None else max(0.0, forecast - (time.time() - began))
        rows.append({"name": name, **asdict(at), "left": left, "seconds": time.time() - began})
    return rows


def live_table(rows: list[dict[str, Any]], counts: Mapping[str, int], width: int) -> rich.table.Table:
    """The running jobs as a table; a narrow terminal gets what matters most."""
    from rich.markup import escape
    from rich.table import Table

    said = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    table = Table(caption=said, caption_justify="left")
    shown = ["job", "stage", "at", "done", "rate", "left"]
    if any(row["device_bytes"] for row in rows):
        shown.append("GPU memory")
    if width >= 110:
        shown += ["for", "host memory"]
    for name in shown:
        table.add_column(name, justify="left" if name in ("job", "stage", "at") else "right", no_wrap=name != "job")
    for row in rows:
        cells = {
            "job": escape(row["name"]),
            "stage": row["stage"],
            "at": escape(row["at"]),
            "done": f"{row['share']:.0%}",
            "rate": f"{size_text(row['rate'])}/s" if row["rate"] else "",
            "left": time_text(row["left"]),
            "GPU memory": size_text(row["device_bytes"]) if row["device_bytes"] else "",
            "for": time_text(row["seconds"]),
            "host memory": size_text(row["rss"]) if row["rss"] else "",
        }
        table.add_row(*(cells[name] for name in shown))
    return table


def _in_words(row: Mapping[str, Any]) -> str:
    words = [f"{row['stage']} {row['at']}".strip(), f"{row['share']:.0%}"]
    if row["rate"]:
        words.append(f"{size_text(row['rate'])}/s")
    words.append(f"about {time_text(row['left'])} left")
    if row["device_bytes"]:
        words.append(f"{size_text(row['device_bytes'])} of the GPU")
    return ", ".join(words)


def show_status(directory: Path, console: Console) -> bool:
    """A batch as another shell sees it; False if there is none."""
    if not (directory / FILE).exists():
        return False
    night, alive = fold(directory / FILE), is_running(directory)
    counts: dict[str, int] = {}
    for record in night.records.values():
        counts[record.status] = counts.get(record.status, 0) + 1
    for name, record in night.records.items():
        last = record.attempts[-1] if record.attempts else None
        taken = f" in {time_text(last.ended - last.began)}" if last and last.ended else ""
        why = f" ({record.kind}): {(record.reason or '').splitlines()[0]}" if record.kind and record.reason else ""
        if record.status != "running":
            console.say(f"{name}: {record.status}{taken}{why}")
        elif not alive:
            console.say(f"{name}: stopped with its batch")
    try:
        live = json.loads((directory / LIVE).read_text(encoding="utf-8")) if alive else None
        live = live if live and live["pid"] == night.batch.get("pid") else None
    except (OSError, ValueError):
        live = None
    if live is not None:
        console.rich.print(live_table(live["jobs"], live["counts"], console.rich.width))
    if alive:
        state = "running"
    elif night.ended is not None:
        state = f"ended {time.strftime('%Y-%m-%d %H:%M', time.localtime(night.ended))}"
    else:
        state = f"not running: it was killed or stopped; go on with: {night.batch.get('command', 'the same command')}"
    console.say(f"{directory}: {state}; report: {directory / 'report.html'}")
    return True


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _write(path: Path, data: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data), encoding="utf-8")
    temporary.replace(path)
