"""Where jobs run: one small interface, and its first implementation, the processes of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pipeline.batch.forecast import measured
from pipeline.batch.job import Asked, Ending, ask, ending_path
from pipeline.batch.planning import Facts
from pipeline.batch.processes import oom_kills, signal_name
from pipeline.batch.progress import EVENTS, Follower, Progress
from pipeline.calibration.machine import available_memory
from pipeline.events import read_events
from pipeline.plan import written_already

MEMORY_SHARE = 0.95  # of what is free: the rest is for the system and for the batch itself
DISK_RESERVE = 256 << 20  # bytes that stay free on every drive


class Executor(Protocol):
    """Runs jobs, each in a process of its own, and says how they end. It retries nothing by its own judgement."""

    name: str
    here: bool  # jobs run on this machine: its drives and memory decide what may start

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
        """Ask all jobs to stop at their unit's end."""

    def close(self) -> None:
        """End what is left, at once."""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    facts: Facts
    place: Path
    gpu: str | None
    kills_before: int
    follower: Follower


@dataclass
class Local:
    """The processes of this machine.

    Attributes:
        gpus: what CUDA_VISIBLE_DEVICES would call them.
        per_gpu: jobs at once on each; they share its memory evenly.
        others: jobs at once that need no GPU, or find none.
    """

    gpus: Sequence[str] = ()
    per_gpu: int = 1
    others: int = 1
    name: str = "this machine"
    here: bool = True
    _running: dict[str, _Running] = field(default_factory=dict)

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

    @staticmethod
    def _room(facts: Facts, others: Iterable[Facts]) -> bool:
        """Whether the output's drive holds this job beside what the running ones have yet to write there."""
        drive = _drive(Path(facts.output))
        promised = sum(_to_write(other) for other in others if _drive(Path(other.output)) == drive)
        free = shutil.disk_usage(_existing(Path(facts.output))).free
        return _to_write(facts) + promised + DISK_RESERVE <= free

    def start(self, asked: Asked, facts: Facts, place: Path) -> None:
        """See `Executor`."""
        gpu = self._slot(facts)
        assert gpu is not None
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        asked = share_gpu(asked, self.per_gpu) if gpu else asked
        command = ask(asked, place, os.getpid())
        kills = oom_kills()
        with (place / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        follower = Follower(Path(facts.output), facts.read_bytes + facts.layer_bytes, time.time())
        self._running[asked.job] = _Running(process, facts, place, gpu, kills, follower)

    def ended(self) -> list[tuple[str, Ending]]:
        """See `Executor`."""
        found = []
        for name, entry in list(self._running.items()):
            if (status := entry.process.poll()) is None:
                continue
            del self._running[name]
            ending = how_ended(status, entry.place, oom_kills() > entry.kills_before)
            timed(ending, entry.facts, entry.follower.since)
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
            if entry.process.poll() is None:
                entry.process.send_signal(signal.SIGTERM)

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
    if status < 0:
        return Ending("killed", status, f"its process was ended by {signal_name(status)}")
    return Ending("crashed", status, f"its process ended with status {status} and without a word")


def timed(ending: Ending, facts: Facts, began: float) -> None:
    """Put a run's times into its ending, on the machine that it ran on, just after its end."""
    ending.began = began
    if ending.kind == "done" and not ending.already:
        try:
            ending.parts = measured(read_events(Path(facts.output) / EVENTS), began, time.time())
        except (OSError, KeyError):
            ending.parts = None


def share_gpu(asked: Asked, jobs: int) -> Asked:
    """A job that shares its GPU with others takes its part of the memory; the recipe's own limit would win."""
    if jobs <= 1 or not (part := gpu_memory() // jobs):
        return asked
    return replace(asked, overrides=(f"runtime.device_memory={part // 10**6}MB", *asked.overrides))


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, without importing torch."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word.strip() for word in named.split(",") if word.strip() and word.strip() != "-1"]
    return [line for line in _nvidia_smi("index") if line.isdigit()]


def gpu_memory() -> int:
    """Bytes of the smallest GPU's memory; 0 where there is none."""
    found = [int(line) for line in _nvidia_smi("memory.total") if line.isdigit()]  # MiB
    return min(found, default=0) << 20


def _nvidia_smi(field: str) -> list[str]:
    try:
        asked = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if not done.returncode else []


def describe_machine(gpus: Sequence[str]) -> str:
    """For a reader: the host, its cores, memory and GPUs."""
    from pipeline.calibration.machine import total_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = f"{len(gpus)} GPU(s)" if gpus else "no GPU"
    return f"{socket.gethostname()}: {cores} cores, {total_memory() / 2**30:.0f} GiB, {kind}"


def _to_write(facts: Facts) -> int:
    return max(0, facts.disk - written_already(facts.partial))


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _drive(path: Path) -> int:
    return _existing(path).stat().st_dev
