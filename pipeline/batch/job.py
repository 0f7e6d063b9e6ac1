"""A job of a batch in a process of its own: what it is asked, and how it says how it ended.

    python -m pipeline.batch.job ASKED.json

What it says goes to standard output, a log that its batch keeps. How it ended is written to the file that it was told,
as an `Ending`; a process that ends without was killed, and nothing is lost but the unit it was at.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import Busy, OtherRun, PipelineError, from_os_error, is_out_of_memory
from pipeline.machine.processes import die_with_parent

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from pipeline.verify.report import Report

MACHINE_FIELDS = frozenset({"device", "threads"})  # of an identity: they differ between the nodes of a cluster
BUSY_POLL = 1.0


@dataclass(frozen=True)
class Asked:
    """What a job's process does.

    Attributes:
        job: its name in the batch.
        text: the recipe, as `recipe_yaml` wrote it.
        overrides: on top, e.g. those of a retry.
        restarts: fields of an identity; what another run began that differs in these alone is thrown away.
        until: seconds since the epoch after which it stops at its unit's end; None: no limit.
        forecast: seconds that it is thought to take; it does not start if they end after `until`.
        lock_wait: seconds to wait for another process on the same output, as one that a lost batch left behind.
        cluster: other nodes, with other processors, may have begun it, or published it.
    """

    job: str
    text: str
    overrides: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    until: float | None = None
    forecast: float = 0.0
    lock_wait: float = 120.0
    cluster: bool = False


@dataclass
class Ending:
    """How a job's process ended.

    Attributes:
        kind: ``done``, ``late`` (not started: the window was too short by then), ``crashed``, ``killed``, or the class
            of what was raised (see `pipeline.errors`).
        exit_status: of the process; negative for a signal.
        reason: for the user.
        node: the machine.
        notes: what it did beyond what was asked.
        already: it was published before.
        peak_rss: bytes, of this process.
        verdict: of the verification.
        quality: figures about the result, by name.
        log: of a machine whose files the batch cannot read, what the job said.
        began: when its process started, seconds since the epoch.
        parts: seconds of each part of a whole run; see `forecast.measured`.
        share: of the source's bytes that were through by then.
        shared: the batch can read the files of the machine that it ran on.
    """

    kind: str
    exit_status: int | None = None
    reason: str = ""
    node: str = field(default_factory=socket.gethostname)
    notes: list[str] = field(default_factory=list)
    already: bool = False
    peak_rss: int = 0
    verdict: dict[str, Any] | None = None
    quality: dict[str, float] = field(default_factory=dict)
    log: str = ""
    began: float | None = None
    parts: dict[str, float] | None = None
    share: float = 0.0
    shared: bool = True

    @classmethod
    def read(cls, path: Path) -> Ending | None:
        """What a process wrote; None if it did not come to that."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def ask(asked: Asked, place: Path, parent: int) -> list[str]:
    """Write down what a job is asked; returns the command of its process.

    Args:
        asked: what.
        place: the job's directory.
        parent: the process that will start it.
    """
    place.mkdir(parents=True, exist_ok=True)
    ending_path(place).unlink(missing_ok=True)
    path = place / "asked.json"
    path.write_text(json.dumps({"parent": parent, **asdict(asked)}), encoding="utf-8")
    return [sys.executable, "-m", "pipeline.batch.job", str(path)]


def ending_path(place: Path) -> Path:
    """Where a job's process says how it ended."""
    return place / "ending.json"


# --- in the job's process ----------------------------------------------------------------------------


def main(path: str) -> int:
    """Run a job and write its ending; returns the exit status."""
    signals: list[int] = []

    def interrupt(number: int, frame: Any) -> NoReturn:
        signals.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # before and after the run's own handlers
        signal.signal(number, interrupt)
    place = Path(path).parent
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    parent = data.pop("parent")
    lists = {key: tuple(data[key]) for key in ("overrides", "restarts")}
    try:
        die_with_parent(parent)
        ending = _run(Asked(**{**data, **lists}))
    except KeyboardInterrupt:
        ending = Ending("interrupted", 75, "stopped; what is finished is kept")
    except Exception as error:
        ending = _failed(error)
        if signals:  # within an import, for instance, KeyboardInterrupt becomes an error of the library's
            ending = Ending("interrupted", 75, "stopped; what is finished is kept")
    return _tell(ending, place)


def _failed(error: Exception) -> Ending:
    if isinstance(error, PipelineError):
        return Ending(error.kind, error.exit_status, str(error))
    if isinstance(error, OSError):
        failed = from_os_error(error, "this job")
        return Ending(failed.kind, failed.exit_status, str(failed))
    traceback.print_exc()  # a bug, or a fault of a device: the log has the whole of it
    lines = str(error).strip().splitlines() or [""]
    kind = "out of memory" if is_out_of_memory(error) else "crashed"
    return Ending(kind, 1, f"{type(error).__name__}: {lines[0][:300]}")


def _tell(ending: Ending, place: Path) -> int:
    """Say and write how it ended; returns the exit status, which alone must do where the drive is full."""
    from pipeline.machine.memory import peak_rss_bytes

    ending.peak_rss = peak_rss_bytes()
    try:
        if ending.reason:
            print(ending.reason if ending.exit_status == 75 else f"error: {ending.reason}", flush=True)
        path = ending_path(place)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(ending)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is in the buffer shall not raise again at the end
        return errno.ENOSPC if ending.kind == "disk" else ending.exit_status or 0
    return ending.exit_status or 0


def _run(asked: Asked) -> Ending:
    from pipeline.recipe import recipe as recipes

    if asked.until is not None and time.time() + asked.forecast > asked.until:
        return Ending("late", 75, "not started: by the forecast it would not end within the window")
    recipe = recipes.parse(asked.text, f"{asked.job}.yaml", asked.overrides)
    notes: list[str] = []
    output, report = _convert(recipe, asked, notes)
    verdict = report.as_json() if report is not None else _verdict_before(output)
    return Ending("done", 0, notes=notes, already=report is None, verdict=verdict, quality=_quality(verdict))


def _convert(recipe: Recipe, asked: Asked, notes: list[str]) -> tuple[Path, Report | None]:
    """The published directory, and the verification's report; None if it was published before."""
    from pipeline.checkpoint.result import places
    from pipeline.report.console import Console
    from pipeline.run import runner

    console = Console()
    fresh, deadline = False, time.monotonic() + asked.lock_wait
    while True:
        try:
            outcome = runner.run(recipe, console, fresh)
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(BUSY_POLL)
        except OtherRun as error:
            machine = MACHINE_FIELDS if asked.cluster else frozenset()
            if not error.begun and error.fields <= machine:
                notes.append(f"it was published with {_names(error.fields)} of another node")
                return places(recipe.output)[0], None
            if fresh or not error.begun or not error.fields <= machine | set(asked.restarts):
                raise
            fresh = True  # what was begun with other batches, or where a processor rounds otherwise, cannot go on here
            notes.append(f"started over: what was begun differs in {_names(error.fields)}")
        else:
            console.show_outcome(outcome)
            return outcome.output, None if outcome.already else outcome.report


def _names(fields: frozenset[str]) -> str:
    return " and ".join(sorted(fields))


def _verdict_before(output: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((output / "quantize" / "verify.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _quality(verdict: dict[str, Any] | None) -> dict[str, float]:
    """Figures that the verification came by: perplexity over the source's, where the engine ran."""
    found = ((verdict or {}).get("vllm") or {}).get("generated") or {}
    return {f"perplexity ratio, KV {kv}": float(figures["perplexity_ratio"]) for kv, figures in found.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
