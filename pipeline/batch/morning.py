"""The facts of the morning's report: what the ledger, the plans and the results say, as one dictionary.

`pipeline.report.batch` writes it as JSON and as a page.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.batch.ledger import Attempt, Record
from pipeline.batch.planning import Facts
from pipeline.events import read_events
from pipeline.journal import read_identity

LAST_LINES = 15
REMEDY = {
    "recipe": "mend the recipe, then run the batch again",
    "source": "mend or fetch the checkpoint again, then run the batch again",
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
FILES = (
    ("card", "README.md"),
    ("verification", "quantize/verify.json"),
    ("calibration", "quantize/calibration.json"),
    ("timings", "quantize/layers.json"),
    ("events", "quantize/events.jsonl"),
    ("serving profile", "quantize/serve.yaml"),
)


def compose(
    directory: Path,
    records: Mapping[str, Record],
    facts: Mapping[str, Facts],
    night: Mapping[str, Any],
) -> dict[str, Any]:
    """The report of a batch as it is now.

    Args:
        directory: the batch's.
        records: of its jobs, in order.
        facts: of those that could be planned.
        night: ``command``, ``resume_command``, ``began``, ``ended``, ``executor``, ``machine``, ``until``,
            ``exit_status``, ``counts`` and ``forecast``.
    """
    return {
        "name": directory.name,
        "directory": str(directory),
        **{key: night[key] for key in ("command", "resume_command", "began", "ended", "executor", "machine")},
        "written": time.time(),
        "window": {"until": night["until"]},
        **{key: night[key] for key in ("exit_status", "counts", "forecast")},
        "jobs": [_job(directory, record, facts.get(name)) for name, record in records.items()],
    }


def _job(directory: Path, record: Record, facts: Facts | None) -> dict[str, Any]:
    attempts = record.attempts[record.tonight :]
    last = record.attempts[-1] if record.attempts else None
    ending = last.ending if last else None
    output = Path(facts.output) if facts else None
    failed = record.status in ("failed", "refused")
    place = directory / "jobs" / record.job.name
    verdict = ending.verdict if ending and (attempts or record.status == "published") else None
    return {
        "name": record.job.name,
        "recipe": str(record.job.recipe),
        "overrides": list(record.job.overrides),
        "source": facts.source if facts else None,
        "output": facts.output if facts else None,
        **{key: getattr(facts, key) if facts else None for key in ("backend", "scheme", "kv_cache")},
        "status": record.status,
        "class": record.kind,
        "reason": record.reason,
        "remedy": REMEDY.get(record.kind or "", "the log has the whole of it")
        if record.status != "published"
        else None,
        "notes": [*dict.fromkeys(record.notes)],
        "attempts": [_attempt(attempt) for attempt in attempts],
        "forecast_s": attempts[-1].forecast if attempts else None,
        "seconds": sum(a.ended - a.began for a in attempts if a.ended is not None) if attempts else None,
        "source_bytes": facts.source_bytes if facts else None,
        "output_bytes": facts.output_bytes if facts else None,
        "peak_memory_bytes": facts.peak_memory if facts else None,
        "peak_rss_bytes": max((a.ending.peak_rss for a in attempts if a.ending), default=0) or None,
        "device_bytes": _device_bytes(output) if output and record.status == "published" else None,
        "disk_bytes": facts.disk if facts else None,
        "verdict": _verdict(verdict) if verdict else None,
        "quality": ending.quality if ending else {},
        "files": _files(directory, place, output, facts),
        "last_lines": _last_lines(place / "log.txt") if failed and attempts else [],
        "resume": _resume(record, facts) if record.status != "published" else None,
    }


def _resume(record: Record, facts: Facts | None) -> str:
    """The command that goes on; what another identity began it must be allowed to throw away."""
    words = [*record.job.command, *record.changed]
    if record.changed and facts is not None and facts.batch_tokens:
        begun = read_identity(facts.partial)
        if (
            begun is not None
            and f"calibration.batch_tokens={begun.get('calibration.batch_tokens')}" not in record.changed
        ):
            words.append("--fresh")
    return shlex.join(words)


def _attempt(attempt: Attempt) -> dict[str, Any]:
    ending = attempt.ending
    return {
        "began": attempt.began,
        "ended": attempt.ended,
        "exit_status": ending.exit_status if ending else None,
        "class": (None if ending.kind == "done" else ending.kind) if ending else None,
        "node": ending.node if ending else "",
        "seconds": attempt.ended - attempt.began if attempt.ended is not None else None,
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


def _files(directory: Path, place: Path, output: Path | None, facts: Facts | None) -> list[dict[str, Any]]:
    """What there is to look at; relative links, so that the page can be moved with its drive."""
    wanted: list[tuple[str, Path]] = [("log", place / "log.txt")]
    if output is not None and facts is not None:
        root = output if output.is_dir() else facts.partial
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
            lines: Sequence[str] = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return list(lines[-LAST_LINES:])
