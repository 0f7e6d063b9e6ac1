"""Where jobs run: a small interface, and its first implementation, the processes of this machine."""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pipeline.batch.job import JobRequest, JobResult
from pipeline.batch.planning import JobPlan
from pipeline.batch.progress import EVENTS, Follower, Progress
from pipeline.events import read_events
from pipeline.machine.drives import device_of, drive_space
from pipeline.machine.gpus import gpu_memory
from pipeline.machine.memory import available_memory, total_memory
from pipeline.machine.processes import oom_kills, signal_name
from pipeline.machine.system import System, processors
from pipeline.plan.disk import written_already
from pipeline.run.estimate import measured

MEMORY_SHARE = 0.95  # of the free memory; the rest is for the system and for the batch itself
OOM_SECONDS = 10.0  # at most, between the kernel's count and the end of the process that it killed
DISK_RESERVE = 256 << 20  # bytes that stay free on every drive


class Executor(Protocol):
    """Runs jobs, each in a process of its own, and reports how they end. It never retries a job on its own account.

    Attributes:
        name: for the user.
        here: jobs run on this machine, so its drives and memory decide what may start.
    """

    name: str
    here: bool

    @property
    def gpu(self) -> bool:
        """Whether jobs that want a GPU find one."""

    def refuses(self, plan: JobPlan) -> str | None:
        """Why a job can never run here; None: it can."""

    def waits_for(self, plan: JobPlan) -> str | None:
        """What a job would have to wait for: ``slot``, ``memory`` or ``disk``; None: it may start now."""

    def start(self, request: JobRequest, plan: JobPlan, directory: Path) -> None:
        """Start a job for which `waits_for` returned None.

        Args:
            request: what its process is asked to do.
            plan: what it needs.
            directory: its own; its log is ``log.txt`` there.

        Raises:
            OSError: no process can be made, or the directory cannot be written to.
        """

    def ended(self) -> list[tuple[str, JobResult]]:
        """The names and results of the jobs that have ended since the last call. Does not wait."""

    def progress(self) -> dict[str, Progress]:
        """How far the running jobs are, by name; without those that only wait for a node."""

    def running(self) -> int:
        """How many jobs have been started and have not ended."""

    def stop(self) -> None:
        """Ask all jobs to stop at the end of their unit; each is asked once, since a second signal would cut it."""

    def close(self) -> None:
        """End what is left, at once."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    plan: JobPlan
    directory: Path
    gpu: str | None
    follower: Follower
    stopped: bool = False


@dataclass
class Local:
    """The processes of this machine.

    Attributes:
        gpus: the GPUs, as CUDA_VISIBLE_DEVICES names them.
        per_gpu: how many jobs run at once on each GPU; they share its memory evenly.
        others: how many jobs run at once that need no GPU, or find none.
        downloading: where a download goes, and the bytes that are missing.
    """

    gpus: Sequence[str] = ()
    per_gpu: int = 1
    others: int = 1
    name: str = "this machine"
    here: bool = True
    downloading: tuple[Path, int] | None = None
    _running: dict[str, _Running] = field(default_factory=dict)
    _kills: int = field(default_factory=oom_kills)
    _killed_at: float = -math.inf

    @property
    def gpu(self) -> bool:
        """See `Executor`."""
        return bool(self.gpus)

    def refuses(self, plan: JobPlan) -> str | None:
        """See `Executor`; a plan that is made on this machine has been compared with it already."""
        return None

    def waits_for(self, plan: JobPlan) -> str | None:
        """See `Executor`."""
        if self._slot(plan) is None:
            return "slot"
        running = self._running.values()
        if not self._fits(plan, [entry.plan for entry in running]):
            return "disk"
        promised = sum(max(0, entry.plan.peak_memory - entry.follower.now().rss) for entry in running)
        if running and plan.peak_memory + promised > available_memory() * MEMORY_SHARE:
            return "memory"
        return None

    def _slot(self, plan: JobPlan) -> str | None:
        """The GPU that a job would get, "" for none; None: all slots are taken."""
        taken = [entry.gpu for entry in self._running.values()]
        if plan.gpu and self.gpus:
            free = [gpu for gpu in self.gpus if taken.count(gpu) < self.per_gpu]
            return min(free, key=taken.count) if free else None
        return "" if taken.count("") < self.others else None

    def _fits(self, plan: JobPlan, others: Iterable[JobPlan]) -> bool:
        """Whether each drive holds this job beside what running ones, and a download, have yet to write there."""
        promised = [claim for other in others for claim in _claims(other)]
        if self.downloading is not None:
            promised.append(self.downloading)
        return _fit(_claims(plan), promised)

    def has_room(self, directory: Path, nbytes: int) -> bool:
        """Whether a download of `nbytes` fits beside what running jobs have yet to write to the directory's drive."""
        return _fit([(directory, nbytes)], [claim for entry in self._running.values() for claim in _claims(entry.plan)])

    def start(self, request: JobRequest, plan: JobPlan, directory: Path) -> None:
        """See `Executor`."""
        gpu = self._slot(plan)
        assert gpu is not None
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        request = share_gpu(request, self.per_gpu) if gpu else request
        process = request.start(directory, environment)
        follower = Follower(plan.output, plan.work.read_bytes, time.time())
        self._running[request.job] = _Running(process, plan, directory, gpu, follower)

    def ended(self) -> list[tuple[str, JobResult]]:
        """See `Executor`."""
        found = []
        if (kills := oom_kills()) > self._kills:
            self._kills, self._killed_at = kills, time.monotonic()
        for name, entry in list(self._running.items()):
            if (status := entry.process.poll()) is None:
                continue
            del self._running[name]
            result = result_of(status, entry.directory, time.monotonic() - self._killed_at < OOM_SECONDS)
            if result.kind == "out of memory":
                self._killed_at = -math.inf  # this kill is accounted for
            add_times(result, entry.plan, entry.follower)
            found.append((name, result))
        return found

    def progress(self) -> dict[str, Progress]:
        """See `Executor`."""
        return {name: entry.follower.now() for name, entry in self._running.items()}

    def running(self) -> int:
        """See `Executor`."""
        return len(self._running)

    def stop(self) -> None:
        """See `Executor`."""
        for entry in self._running.values():
            if entry.process.poll() is None and not entry.stopped:
                entry.process.send_signal(signal.SIGTERM)
                entry.stopped = True

    def close(self) -> None:
        """See `Executor`."""
        for entry in self._running.values():
            if entry.process.poll() is None:
                entry.process.kill()
                entry.process.wait()
        self._running.clear()


def result_of(status: int, directory: Path, out_of_memory: bool) -> JobResult:
    """The result that a job's process wrote, or what its return code tells.

    Args:
        status: the return code; negative for a signal.
        directory: the job's own.
        out_of_memory: the kernel has killed a process because memory ran out meanwhile.
    """
    if (result := JobResult.read(directory)) is not None:
        return result
    if status == -signal.SIGKILL and out_of_memory:
        return JobResult("out of memory", status, "the kernel ended it for want of memory (SIGKILL)")
    if status == errno.ENOSPC:
        return JobResult("disk", status, "the disk is full, and so is the one of its log; free some space")
    if status < 0:
        return JobResult("killed", status, f"its process was ended by {signal_name(status)}")
    return JobResult("crashed", status, f"its process ended with status {status} and without a word")


def add_times(result: JobResult, plan: JobPlan, follower: Follower) -> None:
    """Put a run's times into its result; called on the machine that it ran on, just after its end."""
    result.began, result.share = follower.since, follower.now().share
    if result.kind == "done" and not result.already:
        try:
            result.parts = measured(read_events(plan.output / EVENTS), follower.since, time.time())
        except (OSError, KeyError):
            result.parts = None


def share_gpu(request: JobRequest, jobs: int) -> JobRequest:
    """Limit a job to its part of a GPU's memory, unless its recipe has a lower limit of its own.

    Args:
        request: of a job that runs on a GPU.
        jobs: how many share the GPU.
    """
    from pipeline.recipe import recipe as recipes
    from pipeline.units import parse_size

    if jobs <= 1 or not (part := gpu_memory() // jobs):
        return request
    own = recipes.parse(request.text, request.job, request.overrides).runtime.device_memory
    if own is not None and parse_size(own) <= part:
        return request
    return replace(request, overrides=(*request.overrides, f"runtime.device_memory={part // 10**6}MB"))


def describe_machine(gpus: Sequence[str]) -> str:
    """For a reader: the host, its cores, memory and GPUs."""
    cores = processors(System.here()).allowed
    kind = f"{len(gpus)} GPU(s)" if gpus else "no GPU"
    return f"{socket.gethostname()}: {cores} cores, {total_memory() / 2**30:.0f} GiB, {kind}"


def _claims(plan: JobPlan) -> list[tuple[Path, int]]:
    """Where a job has yet to write, and how many bytes."""
    found = [(plan.output, max(0, plan.disk - written_already(plan.partial)))]
    work = plan.recipe.runtime.work_directory
    return found if work is None else [*found, (Path(work), plan.scratch)]


def _fit(wanted: list[tuple[Path, int]], promised: list[tuple[Path, int]]) -> bool:
    """Whether each drive holds the bytes that are wanted on it beside those that are promised to others."""
    needed: Counter[int] = Counter()
    for path, nbytes in [*wanted, *promised]:
        needed[device_of(path)] += nbytes
    return all(needed[device_of(path)] + DISK_RESERVE <= drive_space(path).free for path, _ in wanted)
