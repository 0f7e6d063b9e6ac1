"""The report of a batch: one page and one JSON file over all jobs, failures first."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from markupsafe import Markup, escape

from pipeline import __version__
from pipeline.batch.planning import JobPlan
from pipeline.batch.record import Attempt, JobRecord
from pipeline.checkpoint.writer import write_file
from pipeline.events import read_events
from pipeline.journal import read_identity
from pipeline.units import duration_text, error_text, size_text

if TYPE_CHECKING:
    from pipeline.batch.queue import Queue

SECTIONS = ("failed", "left", "running", "waiting", "published")  # refused jobs are shown with the failed ones
CLASSES = {  # of failures, in words
    "recipe": "the recipe is wrong",
    "source": "the source is missing or damaged",
    "verification": "the result did not pass verification",
    "out of memory": "it ran out of memory",
    "disk": "not enough room on the disk",
    "killed": "the process was killed",
    "crashed": "the process crashed",
    "too large": "too large for this machine",
    "failed": "the run failed",
    "window": "no time left in the window",
    "interrupted": "interrupted after a clean save",
}
REMEDIES = {  # what a reader can do about them
    "recipe": "fix the recipe, then run the batch again",
    "source": "repair or fetch the checkpoint again, then run the batch again",
    "verification": "the result stays in OUTPUT.partial with its report; see quantize/verify.json there",
    "out of memory": "free memory, or lower calibration.batch_tokens or runtime.threads",
    "disk": "free space on the output's drive, or choose another output; what is written is kept",
    "too large": "choose another machine, another drive or smaller settings",
    "killed": "what is finished is kept: the command below goes on",
    "crashed": "the log has the whole of it; what is finished is kept: the command below goes on",
    "busy": "end the other process, or choose another output",
    "window": "run the batch again; it goes on where it stopped",
    "interrupted": "run the batch again; it goes on where it stopped",
}
OTHER_REMEDY = "the log has the whole of it"
EXITS = {
    0: "0, nothing left to do",
    1: "1, not every job is published",
    75: "75, stopped before the end; run it again to go on",
}
FILES = (  # of a result, that the report links to
    ("card", "README.md"),
    ("verification", "quantize/verify.json"),
    ("calibration", "quantize/calibration.json"),
    ("timings", "quantize/layers.json"),
    ("events", "quantize/events.jsonl"),
    ("serving profile", "quantize/serve.yaml"),
)
LAST_LINES = 15  # of a failed job's log
MOST_OPEN = 8  # failures; with more than these the log lines are folded
MOST_COLUMNS = 2  # of quality figures; more than these share one
SLOW = 1.25  # times the estimate; beyond it the bar changes colour

# Escape sequences of terminals, and control characters that HTML does not allow.
_TERMINAL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BACKTICKS = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class RunInfo:
    """What the report says of the run as a whole; the names are those of report.json.

    Attributes:
        command: the command line that started it.
        resume_command: the one that goes on with what is not published.
        executor: where the jobs run.
        machine: where the batch itself runs.
    """

    command: str = ""
    resume_command: str = ""
    executor: str = ""
    machine: str = ""


# --- report.json -------------------------------------------------------------------------------------


def compose(queue: Queue, info: RunInfo) -> dict[str, Any]:
    """The report of a batch as it is now, as plain data: from its records, their plans and the results."""
    directory, now = queue.ledger.directory, time.time()
    return {
        "format": 1,
        "name": directory.name,
        "directory": str(directory),
        "command": info.command,
        "resume_command": info.resume_command,
        "began": queue.ledger.began,
        "ended": None if queue.exit_status is None else now,
        "executor": info.executor,
        "machine": info.machine,
        "written": now,
        "window": {"until": queue.rules.until},
        "exit_status": queue.exit_status,
        "counts": queue.counts(),
        "forecast": queue.estimator.errors(),
        "jobs": [_job(record, directory) for record in queue.records],
    }


def _job(record: JobRecord, directory: Path) -> dict[str, Any]:
    plan, result, attempts = record.plan, record.result, record.current
    recipe, log = plan.recipe if plan else None, directory / "jobs" / record.name / "log.txt"
    published, failed = record.status == "published", record.status in ("failed", "refused")
    verdict = result.verdict if result and (attempts or published) else None
    return {
        "name": record.name,
        "recipe": str(record.job.recipe),
        "overrides": list(record.job.overrides),
        "source": plan.source if plan else None,
        "output": str(plan.output) if plan else None,
        **{key: getattr(recipe, key, None) for key in ("backend", "scheme", "kv_cache")},
        "status": record.status,
        "class": record.kind,
        "reason": record.reason,
        "remedy": None if published else REMEDIES.get(record.kind or "", OTHER_REMEDY),
        "notes": [*dict.fromkeys(record.notes)],
        "attempts": [_attempt(attempt) for attempt in attempts],
        "forecast_s": attempts[-1].estimate if attempts else None,
        "seconds": sum(attempt.seconds or 0.0 for attempt in attempts) if attempts else None,
        "source_bytes": plan.work.source_bytes if plan else None,
        "output_bytes": plan.output_bytes if plan else None,
        "peak_memory_bytes": plan.peak_memory if plan else None,
        "peak_rss_bytes": max((a.result.peak_rss for a in attempts if a.result), default=0) or None,
        "device_bytes": _device_bytes(plan.output) if plan and published else None,
        "disk_bytes": plan.disk if plan else None,
        "verdict": _verdict(verdict) if verdict else None,
        "quality": result.quality if result else {},
        "files": _files(directory, log, plan),
        "last_lines": _last_lines(log) if failed and attempts else [],
        "resume": None if published else _resume(record),
    }


def outputs(directory: Path) -> dict[str, str]:
    """The output of each job by its name, as the last report of a batch has them; empty without one."""
    try:
        found = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        return {job["name"]: job["output"] for job in found["jobs"] if job["output"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _resume(record: JobRecord) -> str:
    """The command that goes on; it must be allowed to discard what a run of another identity began."""
    words, plan = [*record.job.command, *record.changed], record.plan
    if record.changed and plan is not None and plan.batch_tokens:
        begun = read_identity(plan.partial)
        key = "calibration.batch_tokens"
        if begun is not None and f"{key}={begun.get(key)}" not in record.changed:
            words.append("--fresh")
    return shlex.join(words)


def _attempt(attempt: Attempt) -> dict[str, Any]:
    result = attempt.result
    return {
        "began": attempt.began,
        "ended": attempt.ended,
        "exit_status": result.exit_status if result else None,
        "class": result.kind if result and result.kind != "done" else None,
        "node": result.node if result else "",
        "seconds": attempt.seconds,
        "changed": list(attempt.changed),
    }


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: verdict[key] for key in ("passed", "level", "proven_in_vllm", "problems", "notes")}
    return {**found, "server": (verdict.get("vllm") or {}).get("server")}


def _device_bytes(output: Path) -> int | None:
    try:
        events = read_events(output / "quantize" / "events.jsonl")
        return max((event.get("device_bytes", 0) for event in events), default=0) or None
    except OSError:
        return None


def _files(directory: Path, log: Path, plan: JobPlan | None) -> list[dict[str, str]]:
    """The files that a reader may want; links are relative, so that the page can be moved with its drive."""
    wanted = [("log", log)]
    if plan is not None:
        root = plan.output if plan.output.is_dir() else plan.partial
        wanted += [(label, root / name) for label, name in FILES]
    return [
        {"label": label, "href": os.path.relpath(path, directory), "path": str(path)}
        for label, path in wanted
        if path.exists()
    ]


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - (64 << 10)))
            return file.read().decode("utf-8", errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return []


# --- report.html -------------------------------------------------------------------------------------


def write(directory: Path, report: dict[str, Any]) -> tuple[Path, Path]:
    """Write report.json and report.html, each at once: a reader sees the old file or the new one, never a part.

    Args:
        directory: the batch's; made if absent.
        report: as `compose` made it.

    Returns:
        The paths of the JSON and of the page.

    Raises:
        OSError: the files cannot be written; the old ones stay.
    """
    data, page = directory / "report.json", directory / "report.html"
    # A log line may hold bytes that are not UTF-8, as lone surrogates: the escape is JSON's own.
    texts = {data: json.dumps(report, indent=2, ensure_ascii=False) + "\n", page: html(report)}
    for path, text in texts.items():
        write_file(path, text.encode("utf-8", "backslashreplace"))
    return data, page


def html(report: Mapping[str, Any]) -> str:
    """The page for a report that `compose` made: in one piece, without scripts or anything loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.batch"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.tests["local"] = _is_local
    environment.filters |= {
        "size": size_text,
        "duration": duration_text,
        "error": error_text,
        "moment": lambda seconds: _local(seconds).strftime("%a %d %b %Y, %H:%M %Z"),
        "hour": lambda seconds: _local(seconds).strftime("%a %H:%M %Z"),
        "iso": lambda seconds: _local(seconds).isoformat(timespec="seconds"),
        "clean": _clean,
        "log": _log,
        "prose": _prose,
        "verdict": verdict_text,
    }
    sections: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    for job in report["jobs"]:
        sections["failed" if job["status"] == "refused" else job["status"]].append(job)
    sections["failed"].sort(key=lambda job: job["status"] == "refused")  # stable: else in the batch's order
    published = sections["published"]
    sized = [job for job in published if job["source_bytes"] and job["output_bytes"]]
    nodes = {attempt["node"] for job in report["jobs"] for attempt in job["attempts"]}
    return environment.get_template("report.html.jinja").render(
        report=report,
        headline=headline(report),
        parts=_parts(report["counts"]),
        sections=sections,
        classes=CLASSES,
        reasons=Counter(job["class"] or "failed" for job in sections["failed"]).most_common(),
        exits=EXITS,
        most_open=MOST_OPEN,
        slow=SLOW,
        sizes=(sum(job["source_bytes"] for job in sized), sum(job["output_bytes"] for job in sized)),
        validated=sum(bool(job["verdict"] and job["verdict"]["proven_in_vllm"]) for job in published),
        figures=_figures(published),
        columns=MOST_COLUMNS,
        several_nodes=len(nodes) > 1,
        version=__version__,
    )


def headline(report: Mapping[str, Any]) -> str:
    """The batch in one line: ``8 of 12 published, 3 failed, 1 refused``."""
    return ", ".join(text for _, text in _parts(report["counts"]))


def _parts(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The parts of the headline, each with the status that it counts."""
    total, published = sum(counts.values()), counts["published"]
    if not total:
        return [("waiting", "No jobs")]
    if published == total > 1:
        return [("published", f"All {total} published")]
    first = f"{published or 'None'} of {total} published"
    others = ("failed", "refused", "left", "running", "waiting")
    return [("published", first), *((name, f"{counts[name]} {name}") for name in others if counts[name])]


def verdict_text(verdict: Mapping[str, Any] | None) -> str:
    """What verification says of a result, in a few words; None: it was not verified."""
    if verdict is None:
        return "not verified"
    if not verdict["passed"]:
        count = len(verdict["problems"])
        return f"failed: {count} problem{'s' if count != 1 else ''}"
    if not verdict["proven_in_vllm"]:
        return "structure only: not validated in vLLM"
    return f"{'loaded' if verdict['level'] == 'load' else 'loaded and run'} in {verdict['server'] or 'vLLM'}"


def _figures(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all quality figures, in the order in which they appear."""
    return list(dict.fromkeys(name for job in jobs for name in job["quality"]))


def _local(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds).astimezone()


def _clean(text: str) -> str:
    """Text without what only a terminal understands."""
    return _CONTROL.sub("", _TERMINAL.sub("", text))


def _prose(text: str) -> Markup:
    """Text whose `commands` stand in backticks, as markup: escaped, with <code> around them."""
    return Markup(_BACKTICKS.sub(r"<code>\1</code>", str(escape(text))))


def _log(lines: Sequence[str]) -> str:
    """Log lines as a terminal would have left them: the last state of a line that was overwritten."""
    return "\n".join(_clean(line.rstrip("\r\n").rpartition("\r")[2]) for line in lines)


def _is_local(href: str | None) -> bool:
    """Whether a link stays where the page is: no other host, and nothing that runs."""
    if not href:
        return False
    try:
        parts = urlsplit(href)
    except ValueError:
        return False
    return not parts.scheme and not parts.netloc
