"""One job of a batch in a process of its own: the request that it reads and the result that it writes.

    python -m pipeline.batch.job DIRECTORY/asked.json

Standard output is a log that the batch keeps. The process writes its `JobResult` to DIRECTORY/ending.json. A process
that ends without writing one was killed, and nothing is lost but the unit that it was working on.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.batch.worker import read_request, start_worker
from pipeline.errors import Busy, OtherRun, PipelineError, from_os_error, is_out_of_memory
from pipeline.identity import MACHINE_FIELDS

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from pipeline.verify.report import Report

BUSY_POLL = 1.0


@dataclass(frozen=True)
class JobRequest:
    """What a job's process is asked to do.

    Attributes:
        job: its name in the batch.
        text: the recipe, as `recipe_yaml` wrote it.
        overrides: ``KEY=VALUE`` on top of the recipe, for example those of a retry.
        restarts: fields of a run's identity; unfinished work that differs in these fields alone is discarded.
        until: seconds since the epoch at which the window ends; None: no window.
        estimate: seconds that the job is expected to take; it does not start if it would end after `until`.
        lock_wait: seconds to wait for another process on the same output, such as one that a lost batch left behind.
        fresh: a result of another recipe is replaced.
        cluster: other nodes, with other processors, may have begun or published the job.
    """

    job: str
    text: str
    overrides: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    until: float | None = None
    estimate: float = 0.0
    lock_wait: float = 120.0
    cluster: bool = False
    fresh: bool = False

    def start(self, directory: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start the job's process, which ends with this one; the result of an earlier attempt is removed.

        Args:
            directory: the job's own, made if absent; the process appends what it prints to ``log.txt`` there.
            environment: None: that of this process.

        Raises:
            OSError: a file cannot be written, or no process can be made.
        """
        directory.mkdir(parents=True, exist_ok=True)
        result_path(directory).unlink(missing_ok=True)
        data = asdict(self)
        data["forecast"] = data.pop("estimate")  # the file's own word for it
        return start_worker("pipeline.batch.job", directory / "asked.json", data, directory / "log.txt", environment)

    @classmethod
    def read(cls, path: Path) -> JobRequest:
        """The request that `start` wrote; called in the job's process."""
        data = read_request(path)
        data["estimate"] = data.pop("forecast")
        lists = {key: tuple(data[key]) for key in ("overrides", "restarts")}
        return cls(**{**data, **lists})


@dataclass
class JobResult:
    """How a job's process ended.

    Attributes:
        kind: ``done``, ``late`` (not started, because the rest of the window was too short), ``crashed``, ``killed``,
            ``stopped`` (interrupted together with its batch), or the failure class of what was raised (see
            `pipeline.errors`).
        exit_status: of the process; negative for a signal.
        reason: a text for the user.
        node: the machine.
        notes: what it did beyond what was request.
        already: it had been published before.
        peak_rss: bytes, of this process.
        verdict: the verification's report.
        quality: measured quality of the result, by name.
        log: the job's output, from a machine whose files the batch cannot read.
        began: when its process started, in seconds since the epoch.
        parts: seconds of each part of a whole run; see `estimate.measured`.
        share: the share of the source's bytes that had been processed, 0 to 1.
        shared: the batch can read the files of the machine that the job ran on.
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
    def read(cls, directory: Path) -> JobResult | None:
        """The result that a process wrote into its job's directory; None if it ended before that."""
        try:
            return cls(**json.loads(result_path(directory).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def result_path(directory: Path) -> Path:
    """Where a job's process writes its result."""
    return directory / "ending.json"


# --- in the job's process ----------------------------------------------------------------------------


def main(path: str) -> int:
    """Run the job of a request file and write its result beside it; returns the exit status."""
    signals: list[int] = []

    def interrupt(number: int, frame: Any) -> NoReturn:
        signals.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):  # before and after the run's own handlers
        signal.signal(number, interrupt)
    interrupted = JobResult("interrupted", 75, "stopped; what is finished is kept")
    try:
        result = _run(JobRequest.read(Path(path)))
    except KeyboardInterrupt:
        result = interrupted
    except Exception as error:  # within an import, for instance, KeyboardInterrupt becomes an error of the library's
        result = interrupted if signals else _failed(error)
    return _write_result(result, Path(path).parent)


def _failed(error: Exception) -> JobResult:
    if isinstance(error, OSError):
        error = from_os_error(error, "this job")
    if isinstance(error, PipelineError):
        return JobResult(error.kind, error.exit_status, str(error))
    traceback.print_exc()  # a bug, or a fault of a device: the log has all of it
    lines = str(error).strip().splitlines() or [""]
    kind = "out of memory" if is_out_of_memory(error) else "crashed"
    return JobResult(kind, 1, f"{type(error).__name__}: {lines[0][:300]}")


def _write_result(result: JobResult, directory: Path) -> int:
    """Print and write a result; returns the exit status, which alone must do where the drive is full."""
    from pipeline.checkpoint.writer import write_file
    from pipeline.machine.memory import peak_rss_bytes

    result.peak_rss = peak_rss_bytes()
    try:
        if result.reason:
            print(result.reason if result.exit_status == 75 else f"error: {result.reason}", flush=True)
        write_file(result_path(directory), json.dumps(asdict(result)).encode())
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is in the buffer must not raise again at the end
        return errno.ENOSPC if result.kind == "disk" else result.exit_status or 0
    return result.exit_status or 0


def _run(request: JobRequest) -> JobResult:
    from pipeline.recipe import recipe as recipes

    if request.until is not None and time.time() + request.estimate > request.until:
        return JobResult("late", 75, "not started: by the estimate it would not end within the window")
    recipe = recipes.parse(request.text, f"{request.job}.yaml", request.overrides)
    notes: list[str] = []
    output, report = _convert(recipe, request, notes)
    verdict = _recorded_verdict(output)  # as it is published, whichever run made it
    return JobResult("done", 0, notes=notes, already=report is None, verdict=verdict, quality=_quality(verdict))


def _convert(recipe: Recipe, request: JobRequest, notes: list[str]) -> tuple[Path, Report | None]:
    """The published directory, and the verification's report; no report if it had been published before."""
    from pipeline.checkpoint.result import places
    from pipeline.report.console import Console
    from pipeline.run import runner

    console = Console()
    fresh, deadline = False, time.monotonic() + request.lock_wait
    while True:
        try:
            outcome = runner.run(recipe, console, fresh)
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(BUSY_POLL)
        except OtherRun as error:
            machine = MACHINE_FIELDS if request.cluster else frozenset()
            if not error.begun and error.fields <= machine:
                notes.append(f"it was published with {_names(error.fields)} of another node")
                return places(recipe.output)[0], None
            # work with other batches, or of a processor that rounds otherwise, cannot be resumed here
            discards = error.begun and error.fields <= machine | set(request.restarts)
            if fresh or not (request.fresh or discards):
                raise
            fresh = True
            if error.begun:
                notes.append(f"started over: what was begun differs in {_texts(error)}")
        else:
            console.show_outcome(outcome)
            return outcome.output, None if outcome.already else outcome.report


def _texts(error: OtherRun) -> str:
    return "; ".join(difference["text"] for difference in error.differences)


def _names(fields: frozenset[str]) -> str:
    return " and ".join(sorted(fields))


def _recorded_verdict(output: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((output / "quantize" / "verify.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _quality(verdict: dict[str, Any] | None) -> dict[str, float]:
    """Quality that the verification measured: perplexity over that of the source, where the engine ran."""
    found = ((verdict or {}).get("vllm") or {}).get("generated") or {}
    return {f"perplexity ratio, KV {kv}": float(figures["perplexity_ratio"]) for kv, figures in found.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
