"""The command ``quantize batch``, from its words to its exit status."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path

from pipeline.batch.executor import Executor, Local, describe_machine
from pipeline.batch.ledger import FILE, Ledger
from pipeline.batch.manifest import Job, collect
from pipeline.batch.queue import Queue, Rules
from pipeline.batch.report import RunInfo
from pipeline.batch.watch import Watch, show_status
from pipeline.errors import UsageError
from pipeline.machine.gpus import visible_gpus
from pipeline.report.console import Console

PARENT = Path("batch")  # of a batch's directory, where --directory names none
TIME_OF_DAY = re.compile(r"(\d{1,2}):(\d{2})")
UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Options:
    """The command line's options; see ``quantize batch --help``."""

    directory: Path | None = None
    until: str | None = None
    budget: str | None = None
    jobs: int | None = None
    jobs_per_gpu: int = 1
    disk_wait: str = "2h"
    ray: str | None = None
    on_finish: str | None = None
    on_failure: str | None = None
    fresh: bool = False
    dry_run: bool = False


def run(arguments: Sequence[str], options: Options, console: Console) -> tuple[int, Path | None]:
    """Run a batch.

    Args:
        arguments: recipes, directories, manifests and ``KEY=VALUE``; see `manifest.collect`.
        options: of the command line.
        console: for what the user sees.

    Returns:
        The exit status: 0 all is published, 1 something failed or was refused, 75 jobs are left; and the batch's
        directory, where its report is, or None where nothing was run.

    Raises:
        UsageError: the command line or a manifest is wrong.
        PipelineError: the batch runs already, or the cluster cannot be reached.
    """
    name, jobs = collect(arguments)
    directory = (options.directory or PARENT / name).expanduser().absolute()
    disk_wait = seconds(options.disk_wait, "--disk-wait")
    rules = Rules(end_of_window(options, time.time()), disk_wait, options.on_failure, options.on_finish, options.fresh)
    if options.dry_run:
        return _dry_run(jobs, directory, options, console), None
    executor = choose_executor(options)
    try:
        ledger = Ledger.open(directory, jobs)
        try:
            again = replace(options, until=options.until if TIME_OF_DAY.fullmatch(options.until or "") else None)
            info = RunInfo(
                command=shlex.join(command(arguments, options)),
                resume_command=shlex.join(command(arguments, again)),
                executor=executor.name,
                machine=f"{describe_machine(visible_gpus())}; commands run in {Path.cwd()}",
            )
            watch = Watch(console, info, executor.here)
            queue = Queue(ledger, executor, rules, watch)
            console.say(f"{len(jobs)} job(s) on {executor.name}; logs and report in {directory}")
            ledger.begin(command=info.command, executor=executor.name, until=rules.until, pid=os.getpid())
            try:
                queue.plan()
                watch.report(queue)
                return queue.run(), directory
            finally:
                watch.close()
        finally:
            ledger.close()
    finally:
        executor.close()


def _dry_run(jobs: list[Job], directory: Path, options: Options, console: Console) -> int:
    """Show the table and the refusals, on a copy of what the batch remembers: nothing is written, no hook runs."""
    executor = choose_executor(options)
    try:
        with tempfile.TemporaryDirectory(prefix="batch-") as temporary:
            if (directory / FILE).exists():
                shutil.copyfile(directory / FILE, Path(temporary) / FILE)
            ledger = Ledger.open(Path(temporary), jobs)
            queue = Queue(ledger, executor, Rules(fresh=options.fresh), Watch(console, RunInfo(), executor.here))
            queue.plan()
            ledger.close()
            return 1 if queue.counts()["refused"] else 0
    finally:
        executor.close()


def status(directory: Path | None, console: Console) -> Path:
    """Show a batch that is running, or has run.

    Args:
        directory: the batch's; None: the latest below the working directory.
        console: for what the user sees.

    Returns:
        Its directory.

    Raises:
        UsageError: there is no batch.
    """
    if directory is None:
        found = sorted(PARENT.glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UsageError(f"--status: there is no batch in {PARENT.absolute()}", remedy="name its directory")
        directory = found[-1].parent
    if not show_status(directory.absolute(), console):
        raise UsageError(f"--status: {directory}: no batch was run here")
    return directory


def choose_executor(options: Options) -> Executor:
    """Where the jobs will run: on this machine, or on a Ray cluster.

    Raises:
        UsageError: the options contradict each other, or Ray is not installed.
        PipelineError: the cluster does not answer.
    """
    if options.ray is not None:
        if options.jobs is not None:
            raise UsageError("--jobs: Ray places jobs by its nodes' resources", remedy="leave it out with --ray")
        from pipeline.batch.on_ray import RayCluster

        return RayCluster(options.ray, options.jobs_per_gpu)
    gpus = visible_gpus()
    return Local(gpus, options.jobs_per_gpu, options.jobs or 1)


def command(arguments: Sequence[str], options: Options) -> list[str]:
    """The words of the command line that these arguments and options came from, without ``--dry-run``."""
    words = ["quantize", "batch", *arguments]
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name != "dry_run" and value != option.default:
            words += [f"--{option.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def end_of_window(options: Options, now: float) -> float | None:
    """When the window ends, in seconds since the epoch; None: there is no window.

    ``--until`` is a time of day, the next one to come, or a date and time (``2026-11-22T07:00``).

    Args:
        options: of the command line.
        now: seconds since the epoch.

    Raises:
        UsageError: a value is no time, or lies in the past, or both options are given.
    """
    if options.until is not None and options.budget is not None:
        raise UsageError("--until and --budget: both say when to stop", remedy="leave one out")
    if options.budget is not None:
        return now + seconds(options.budget, "--budget")
    if options.until is None:
        return None
    here = datetime.fromtimestamp(now)
    if match := TIME_OF_DAY.fullmatch(options.until):
        try:
            end = here.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
        except ValueError:
            raise UsageError(f"--until: {options.until} is no time of day") from None
        return (end if end > here else end + timedelta(days=1)).timestamp()
    try:
        end = datetime.fromisoformat(options.until)
    except ValueError:
        raise UsageError(f"--until: {options.until!r} is no time", remedy="write 07:00, or 2026-11-22T07:00") from None
    if end.timestamp() <= now:
        raise UsageError(f"--until: {options.until} is over")
    return end.timestamp()


def seconds(text: str, option: str) -> float:
    """The seconds of a text such as ``9h``, ``90m``, ``1h30m`` or ``45s``; `option` is named in the UsageError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|[smhd])", text)
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*(min|[smhd])\s*", "", text).strip():
        raise UsageError(f"{option}: {text!r} is no length of time", remedy="write 9h, 90m or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in parts)
