"""A job of a batch in a process of its own: what it is asked, and how it says how it ended.

    python -m pipeline.batch.job ASKED.json

What it says goes to standard output, a log that its batch keeps. How it ended is written to the file that it was told,
as an `Ending`; a process that ends without was killed, and nothing is lost but the unit it was at.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.batch.processes import die_with_parent
from pipeline.errors import Busy, OtherRun, PipelineError, from_os_error, is_out_of_memory

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.serving.structure import Report

MACHINE_FIELDS = frozenset({"device", "threads"})  # of an identity: they differ between the nodes of a cluster
BUSY_POLL = 1.0


@dataclass(frozen=True)
class Asked:
    """What a job's process does.

    Attributes:
        job: its name in the batch.
        text: the recipe, as `recipe_yaml` wrote it.
        overrides: on top, e.g. those of a retry.
        fresh: throw away what an attempt of another identity left.
        until: seconds since the epoch after which it stops at its unit's end; None: no limit.
        forecast: seconds that it is thought to take; it does not start if they end after `until`.
        lock_wait: seconds to wait for another process on the same output, as one that a lost batch left behind.
        cluster: other nodes, with other processors, may have begun it, or published it.
    """

    job: str
    text: str
    overrides: tuple[str, ...] = ()
    fresh: bool = False
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
    for number in (signal.SIGTERM, signal.SIGINT):  # before and after the run's own handlers
        signal.signal(number, _interrupt)
    place = Path(path).parent
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    parent = data.pop("parent")
    try:
        die_with_parent(parent)
        ending = _run(Asked(**{**data, "overrides": tuple(data["overrides"])}))
    except KeyboardInterrupt:
        ending = Ending("interrupted", 75, "stopped; what is finished is kept")
    except PipelineError as error:
        ending = Ending(error.kind, error.exit_status, str(error))
    except OSError as raised:
        failed = from_os_error(raised, "this job")
        ending = Ending(failed.kind, failed.exit_status, str(failed))
    except Exception as error:  # a bug, or a fault of a device: the log has the whole of it
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        kind = "out of memory" if is_out_of_memory(error) else "crashed"
        ending = Ending(kind, 1, f"{type(error).__name__}: {lines[0][:300]}")
    from pipeline.events import peak_rss_bytes

    ending.peak_rss = peak_rss_bytes()
    if ending.reason:
        print(ending.reason if ending.exit_status == 75 else f"error: {ending.reason}", flush=True)
    _write(ending_path(place), ending)
    return ending.exit_status or 0


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _write(path: Path, ending: Ending) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(ending)), encoding="utf-8")
    temporary.replace(path)


def _run(asked: Asked) -> Ending:
    from pipeline import recipe as recipes

    if asked.until is not None and time.time() + asked.forecast > asked.until:
        return Ending("late", 75, "not started: by the forecast it would not end within the window")
    recipe = recipes.parse(asked.text, f"{asked.job}.yaml", asked.overrides)
    notes: list[str] = []
    output, report = _convert(recipe, asked, notes)
    verdict = report.as_json() if report is not None else _verdict_before(output)
    return Ending("done", 0, notes=notes, already=report is None, verdict=verdict, quality=_quality(verdict))


def _convert(recipe: Recipe, asked: Asked, notes: list[str]) -> tuple[Path, Report | None]:
    """The published directory, and the verification's report; None if it was published before."""
    from pipeline import runner
    from pipeline.report.console import Console

    console = Console()
    fresh, deadline = asked.fresh, time.monotonic() + asked.lock_wait
    while True:
        try:
            outcome = runner.run(recipe, console, fresh)
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(BUSY_POLL)
        except OtherRun as error:
            if not asked.cluster or fresh or not error.fields <= MACHINE_FIELDS:
                raise
            differ = f"the {' and '.join(sorted(error.fields))} of another node"
            if not error.begun:
                notes.append(f"it was published with {differ}")
                return runner.places(recipe)[0], None
            fresh = True  # what was begun there cannot go on here: this processor rounds otherwise
            notes.append(f"started over: what was begun with {differ} cannot go on here")
        else:
            console.show_outcome(outcome)
            return outcome.output, outcome.report


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
