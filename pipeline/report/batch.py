"""The morning report of a batch: one page and one JSON file over all jobs, failures first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from markupsafe import Markup, escape

from pipeline import __version__
from pipeline.checkpoint.writer import write_file
from pipeline.units import duration_text, size_text

SECTIONS = ("failed", "left", "running", "waiting", "published")  # what was refused stands with what failed
CLASSES = {
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
EXITS = {
    0: "0, nothing left to do",
    1: "1, not every job is published",
    75: "75, stopped before the end; run it again to go on",
}
MOST_OPEN = 8  # failures; of more than these the log lines are folded
MOST_COLUMNS = 2  # of quality figures; more than these share one
SLOW = 1.25  # times the forecast; beyond it the bar changes colour

# Escape sequences of terminals, and control characters that are no text and that HTML does not allow.
_TERMINAL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BACKTICKS = re.compile(r"`([^`\n]+)`")


def write(directory: Path, report: dict[str, Any]) -> tuple[Path, Path]:
    """Write report.json and report.html, each at once: who reads meanwhile sees the old one or the new one.

    Args:
        directory: the batch's; made if absent.
        report: what the batch knows of its jobs.

    Returns:
        The paths of the JSON and of the page.
    """
    data, page = directory / "report.json", directory / "report.html"
    # A log line may hold bytes that were no UTF-8, as lone surrogates: the escape is JSON's own.
    texts = {data: json.dumps(report, indent=2, ensure_ascii=False) + "\n", page: html(report)}
    for path, text in texts.items():
        write_file(path, text.encode("utf-8", "backslashreplace"))
    return data, page


def html(report: Mapping[str, Any]) -> str:
    """The page, in one piece: no script, and nothing that is loaded from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.report"),
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
    return environment.get_template("batch.html.jinja").render(
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
        proven=sum(bool(job["verdict"] and job["verdict"]["proven_in_vllm"]) for job in published),
        figures=_figures(published),
        columns=MOST_COLUMNS,
        several_nodes=len(nodes) > 1,
        version=__version__,
    )


def headline(report: Mapping[str, Any]) -> str:
    """The batch in a line: ``8 of 12 published, 3 failed, 1 refused``."""
    return ", ".join(text for _, text in _parts(report["counts"]))


def _parts(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """The headline's parts, each with the status it speaks of."""
    total, published = sum(counts.values()), counts["published"]
    if not total:
        return [("waiting", "No jobs")]
    if published == total > 1:
        return [("published", f"All {total} published")]
    first = f"{published or 'None'} of {total} published"
    others = ("failed", "refused", "left", "running", "waiting")
    return [("published", first), *((name, f"{counts[name]} {name}") for name in others if counts[name])]


def verdict_text(verdict: Mapping[str, Any] | None) -> str:
    """What verification says of a result, in a few words."""
    if verdict is None:
        return "not verified"
    if not verdict["passed"]:
        count = len(verdict["problems"])
        return f"failed: {count} problem{'s' if count != 1 else ''}"
    if not verdict["proven_in_vllm"]:
        return "structure only: not proven in vLLM"
    return f"{'loaded' if verdict['level'] == 'load' else 'loaded and run'} in {verdict['server'] or 'vLLM'}"


def _figures(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all quality figures, in the order in which they are met."""
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
    """Log lines as a terminal would have left them: of a line that was overwritten, the last state."""
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
