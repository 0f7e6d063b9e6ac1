"""Where jobs run: one small interface, and its first implementation, the processes of this machine."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pipeline.batch.forecast import measured
from pipeline.batch.job import Asked, Ending, ask, ending_path
from pipeline.batch.planning import Facts
from pipeline.batch.progress import EVENTS, Follower, Progress
from pipeline.events import read_events
from pipeline.machine.drives import device_of, existing
from pipeline.machine.gpus import gpu_memory
from pipeline.machine.memory import available_memory
from pipeline.machine.processes import oom_kills, signal_name
from pipeline.plan.disk import written_already

MEMORY_SHARE = 0.95  # of what is free: the rest is for the system and for the batch itself
OOM_SECONDS = 10.0  # between the kernel's count and the end of the process that it killed
DISK_RESERVE = 256 << 20  # bytes that stay free on every drive


class Executor(Protocol):
    """Runs jobs, each in a process of its own, and says how they end. It retries nothing by its own judgement."""

    name: str
    here: bool  # jobs run on this machine: its drives and memory decide what may start

    @property
    def gpu(self) -> bool:
        """Whether jobs that want a GPU find one."""

    def refuses(self, facts: Facts) -> str | None:
        """Why a job can never run here; None: it can."""

    def wants(self, facts: Facts) -> str | None:
        """What a job would have to wait for: ``slot``, ``memory`` or ``disk``; None: it may start now."""

    def start(self, asked: Asked, facts: Facts, place: Path) -> None:
        """Start a job that `wants` has nothing against; its log is ``place/log.txt``."""

    def ended(self) -> list[tuple[str, Ending]]:
        """The jobs that have ended since the last call. Does not wait."""

    def progress(self) -> dict[str, Progress]:
        """How far the running jobs are, by name; those that only wait for a place are not among them."""

    def running(self) -> int:
        """How many have been started and have not ended."""

    def stop(self) -> None:
        """Ask all jobs to stop at their unit's end; each is asked once, since a second signal would cut the unit."""

    def close(self) -> None:
        """End what is left, at once."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    facts: Facts
    place: Path
    gpu: str | None
    follower: Follower
    stopped: bool = False


@dataclass
class Local:
    """The processes of this machine.

    Attributes:
        gpus: what CUDA_VISIBLE_DEVICES would call them.
        per_gpu: jobs at once on each; they share its memory evenly.
        others: jobs at once that need no GPU, or find none.
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

    def refuses(self, facts: Facts) -> str | None:
        """See `Executor`; plans that are made here have been held against this machine already."""
        return None

    def wants(self, facts: Facts) -> str | None:
        """See `Executor`."""
        if self._slot(facts) is None:
            return "slot"
        running = self._running.values()
        if not running:
            return None if self._room(facts, ()) else "disk"
        if not self._room(facts, [entry.facts for entry in running]):
            return "disk"
        promised = sum(max(0, entry.facts.peak_memory - entry.follower.now().rss) for entry in running)
        if facts.peak_memory + promised > available_memory() * MEMORY_SHARE:
            return "memory"
        return None

    def _slot(self, facts: Facts) -> str | None:
        """The GPU that a job would get, "" for none; None: all places are taken."""
        taken = [entry.gpu for entry in self._running.values()]
        if facts.gpu and self.gpus:
            free = [gpu for gpu in self.gpus if taken.count(gpu) < self.per_gpu]
            return min(free, key=taken.count) if free else None
        return "" if taken.count("") < self.others else None

    def _room(self, facts: Facts, others: Iterable[Facts]) -> bool:
        """Whether each drive holds this job beside what running ones, and a download, have yet to write there."""
        promised: Counter[int] = Counter()
        for path, nbytes in [claim for other in others for claim in _claims(other)]:
            promised[device_of(path)] += nbytes
        if self.downloading is not None:
            promised[device_of(self.downloading[0])] += self.downloading[1]
        own: Counter[int] = Counter()
        for path, nbytes in _claims(facts):
            own[device_of(path)] += nbytes
        return all(
            own[device_of(path)] + promised[device_of(path)] + DISK_RESERVE <= shutil.disk_usage(existing(path)).free
            for path, _ in _claims(facts)
        )

    def has_room(self, place: Path, nbytes: int) -> bool:
        """Whether a download of so many bytes fits beside what running jobs have yet to write to its drive."""
        drive = device_of(place)
        claims = [claim for entry in self._running.values() for claim in _claims(entry.facts)]
        promised = sum(size for path, size in claims if device_of(path) == drive)
        return nbytes + promised + DISK_RESERVE <= shutil.disk_usage(existing(place)).free

    def start(self, asked: Asked, facts: Facts, place: Path) -> None:
        """See `Executor`."""
        gpu = self._slot(facts)
        assert gpu is not None
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        asked = share_gpu(asked, self.per_gpu) if gpu else asked
        command = ask(asked, place, os.getpid())
        with (place / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        follower = Follower(Path(facts.output), facts.read_bytes + facts.layer_bytes, time.time())
        self._running[asked.job] = _Running(process, facts, place, gpu, follower)

    def ended(self) -> list[tuple[str, Ending]]:
        """See `Executor`."""
        found = []
        if (kills := oom_kills()) > self._kills:
            self._kills, self._killed_at = kills, time.monotonic()
        for name, entry in list(self._running.items()):
            if (status := entry.process.poll()) is None:
                continue
            del self._running[name]
            ending = how_ended(status, entry.place, time.monotonic() - self._killed_at < OOM_SECONDS)
            if ending.kind == "out of memory":
                self._killed_at = -math.inf  # it is accounted for
            timed(ending, entry.facts, entry.follower)
            found.append((name, ending))
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


def how_ended(status: int, place: Path, out_of_memory: bool) -> Ending:
    """The ending of a job's process: its own word, or what its return code tells.

    Args:
        status: the return code; negative for a signal.
        place: the job's directory.
        out_of_memory: the kernel has ended a process for want of memory meanwhile.
    """
    if (ending := Ending.read(ending_path(place))) is not None:
        return ending
    if status == -signal.SIGKILL and out_of_memory:
        return Ending("out of memory", status, "the kernel ended it for want of memory (SIGKILL)")
    if status == errno.ENOSPC:
        return Ending("disk", status, "the disk is full, and so is the one of its log; free some space")
    if status < 0:
        return Ending("killed", status, f"its process was ended by {signal_name(status)}")
    return Ending("crashed", status, f"its process ended with status {status} and without a word")


def timed(ending: Ending, facts: Facts, follower: Follower) -> None:
    """Put a run's times into its ending, on the machine that it ran on, just after its end."""
    ending.began, ending.share = follower.since, follower.now().share
    if ending.kind == "done" and not ending.already:
        try:
            ending.parts = measured(read_events(Path(facts.output) / EVENTS), follower.since, time.time())
        except (OSError, KeyError):
            ending.parts = None


def share_gpu(asked: Asked, jobs: int) -> Asked:
    """A job that shares its GPU with others takes its part of the memory, or the recipe's own limit if that is less."""
    from pipeline.recipe import recipe as recipes
    from pipeline.units import parse_size

    if jobs <= 1 or not (part := gpu_memory() // jobs):
        return asked
    own = recipes.parse(asked.text, asked.job, asked.overrides).runtime.device_memory
    if own is not None and parse_size(own) <= part:
        return asked
    return replace(asked, overrides=(*asked.overrides, f"runtime.device_memory={part // 10**6}MB"))


def describe_machine(gpus: Sequence[str]) -> str:
    """For a reader: the host, its cores, memory and GPUs."""
    from pipeline.machine.memory import total_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = f"{len(gpus)} GPU(s)" if gpus else "no GPU"
    return f"{socket.gethostname()}: {cores} cores, {total_memory() / 2**30:.0f} GiB, {kind}"


def _claims(facts: Facts) -> list[tuple[Path, int]]:
    """Where a job has yet to write, and how many bytes."""
    found = [(Path(facts.output), max(0, facts.disk - written_already(facts.partial)))]
    return [*found, (Path(facts.work), facts.scratch)] if facts.work is not None else found
