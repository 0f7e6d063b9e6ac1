"""Jobs as tasks of a Ray cluster: Ray places them by their CPUs, GPU, memory and disk, and runs them again elsewhere
when a node is lost.

A task starts the same process as the local executor does, and reports its progress to a board (an actor on the batch's
own node). What a lost node had begun goes on from the journal where its output is on shared storage, and starts over
where it was on the node's own drive.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.batch.executor import add_times, result_of, share_gpu
from pipeline.batch.job import JobRequest, JobResult
from pipeline.batch.planning import JobPlan
from pipeline.batch.progress import Follower, Progress
from pipeline.batch.worker import end_worker
from pipeline.errors import PipelineError, UsageError
from pipeline.machine.processes import oom_kills
from pipeline.units import size_text

DISK = "nvme_gb"  # the resource by which nodes declare how much of their drive conversions may take
RETRIES = 5  # nodes that a job may lose in one attempt
TELL = 1.0  # seconds between two reports to the board
LOST = 15.0  # seconds after which a node that the cluster has given up takes its job with it
LOG_BYTES = 256 << 10  # at most, of the log of a node without shared storage that the batch gets
MARK = "mark"
SETTINGS = {  # of Ray, for this driver
    "RAY_task_oom_retries": "0",  # what its memory monitor ends comes back to the queue; Ray would retry it for ever
}


class Board:
    """What the tasks report, and whether they should stop; an actor. One that Ray had to restart knows nothing."""

    def __init__(self) -> None:
        self.nodes: dict[int, list[dict[str, str]]] = {}
        self.progress: dict[int, dict[str, Any]] = {}
        self.stopping = False

    def begins(self, number: int, node: dict[str, str]) -> None:
        """The task of an attempt runs, for the first time or again, on the node with this ``id`` and ``name``."""
        self.nodes.setdefault(number, []).append(node)

    def tell(self, number: int, progress: dict[str, Any]) -> bool:
        """A task reports its `Progress` as a dictionary; returns whether its job should stop."""
        self.progress[number] = progress
        return self.stopping

    def stop(self) -> None:
        """All jobs should stop at the end of their unit."""
        self.stopping = True

    def all(self) -> tuple[dict[int, list[dict[str, str]]], dict[int, dict[str, Any]]]:
        """By attempt: the nodes that its task has run on, and its latest progress."""
        return self.nodes, self.progress


def task(request: JobRequest, plan: JobPlan, place: str, mark: str, per_gpu: int, number: int, board: Any) -> JobResult:
    """Run a job on whichever node Ray chose: start its process, tell the board, and end with it.

    Args:
        request: what the job's process is asked to do.
        plan: what it needs.
        place: the job's directory on the batch's machine.
        mark: the batch's; a node that reads it two levels above `place` shares the batch's storage.
        per_gpu: how many jobs share a GPU.
        number: the attempt's, unique in this batch.
        board: the actor of `Board`.
    """
    import ray

    context = ray.get_runtime_context()
    node = {"id": context.get_node_id(), "name": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"}
    ray.get(board.begins.remote(number, node))
    directory = Path(place)
    shared = _reads(directory.parents[1] / MARK) == mark
    if not shared:
        directory = Path(tempfile.gettempdir()) / f"fp8-batch-{os.getuid()}" / mark / request.job
    if plan.gpu and ray.get_gpu_ids():
        request = share_gpu(request, per_gpu)
    follower, kills, log = Follower(plan.output, plan.work.read_bytes, time.time()), oom_kills(), directory / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    process = request.start(directory)
    try:
        stopped = False
        while process.poll() is None:
            if ray.get(board.tell.remote(number, asdict(follower.now()))) and not stopped:
                process.terminate()  # once: a second signal would cut the unit
                stopped = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(TELL)
    finally:
        end_worker(process)  # if it was cancelled, or the board is lost for good
    result = result_of(process.returncode, directory, oom_kills() > kills)
    add_times(result, plan, follower)
    result.node, result.shared = node["name"], shared
    if not shared:
        with log.open("rb") as file:
            file.seek(max(before, log.stat().st_size - LOG_BYTES))
            result.log = file.read().decode("utf-8", errors="replace")
    return result


def _reads(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None


@dataclass
class _Submitted:
    ref: Any
    number: int
    lost_since: float | None = None


@dataclass
class RayCluster:
    """The executor for a Ray cluster that is running already.

    Attributes:
        address: as ``ray start`` printed it, or ``auto``.
        per_gpu: how many jobs share a GPU.

    Raises:
        UsageError: Ray is not installed.
        PipelineError: the cluster does not answer.
    """

    address: str
    per_gpu: int = 1
    name: str = ""
    here: bool = False
    _ray: Any = None
    _board: Any = None
    _task: Any = None
    _count: int = 0
    _looked: float = 0.0
    _submitted: dict[str, _Submitted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            remedy = "pip install 'fp8-pipeline[ray]' on every node"
            raise UsageError("--ray: Ray is not installed", remedy=remedy) from None
        self._ray = ray
        _connect(ray, self.address)
        nodes = self._nodes()
        self.name = f"Ray at {ray.get_runtime_context().gcs_address}, {len(nodes)} node(s)"
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        self._board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here, **lasting).remote()
        self._task = ray.remote(task)

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    @property
    def gpu(self) -> bool:
        """See `Executor`."""
        return any(node["Resources"].get("GPU") for node in self._nodes())

    def needs(self, plan: JobPlan) -> dict[str, float]:
        """The resources of a job's task, as Ray names them; GPU and disk (in GB) where nodes declare any."""
        declared = [node["Resources"] for node in self._nodes()]
        cores = max((resources.get("CPU", 0.0) for resources in declared), default=0.0)
        found = {"CPU": max(1.0, min(float(plan.threads), cores)), "memory": float(plan.peak_memory)}
        if plan.gpu and any(resources.get("GPU") for resources in declared):
            found["GPU"] = 1.0 / self.per_gpu
        if any(DISK in resources for resources in declared):
            found[DISK] = float(math.ceil(plan.disk / 10**9))
        return found

    def refuses(self, plan: JobPlan) -> str | None:
        """See `Executor`: a task that no node can ever hold would wait for ever, and Ray would not say so."""
        needs, nodes = self.needs(plan), self._nodes()
        if any(all(node["Resources"].get(key, 0.0) >= value for key, value in needs.items()) for node in nodes):
            return None
        text = ", ".join(
            f"{size_text(value)} of memory" if key == "memory" else f"{value:g} {key}" for key, value in needs.items()
        )
        return f"no node of the cluster has all of {text}"

    def waits_for(self, plan: JobPlan) -> str | None:
        """See `Executor`; Ray itself decides when a task starts."""
        return None

    def start(self, request: JobRequest, plan: JobPlan, directory: Path) -> None:
        """See `Executor`."""
        needs = self.needs(plan)
        self._count += 1
        directory.mkdir(parents=True, exist_ok=True)
        mark = _reads(directory.parents[1] / MARK)
        if mark is None:  # by which a node knows that it sees this directory, and not one of the same name
            mark = secrets.token_hex(8)
            (directory.parents[1] / MARK).write_text(mark, encoding="ascii")
        ref = self._task.options(
            name=request.job,
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            memory=int(needs["memory"]),
            resources={DISK: needs[DISK]} if DISK in needs else None,
            max_retries=RETRIES,
        ).remote(request, plan, str(directory), mark, self.per_gpu, self._count, self._board)
        self._submitted[request.job] = _Submitted(ref, self._count)

    def ended(self) -> list[tuple[str, JobResult]]:
        """See `Executor`."""
        if not self._submitted:
            return []
        refs = [entry.ref for entry in self._submitted.values()]
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        if not ready and not self._due():
            return []
        seen_on, _ = self._ray.get(self._board.all.remote())
        found = []
        for name, entry in list(self._submitted.items()):
            nodes = seen_on.get(entry.number, [])
            if entry.ref in ready:
                result = self._result(entry)
            elif self._is_lost(entry, nodes):
                self._ray.cancel(entry.ref, force=True)
                result = JobResult("killed", None, f"its node {nodes[-1]['name']} was lost", nodes[-1]["name"])
            else:
                continue
            del self._submitted[name]
            for before, after in pairwise(nodes):
                result.notes.append(f"its process or node was lost at {before['name']}; taken up at {after['name']}")
            found.append((name, result))
        return found

    def _due(self) -> bool:
        """Every few seconds it is time to look for lost nodes."""
        now = time.monotonic()
        if now - self._looked < LOST / 5:
            return False
        self._looked = now
        return True

    def _is_lost(self, entry: _Submitted, nodes: list[dict[str, str]]) -> bool:
        """A node that is cut off, not dead, keeps its task's connection open: Ray would wait for it."""
        alive = {node["NodeID"] for node in self._nodes()}
        if not nodes or nodes[-1]["id"] in alive:
            entry.lost_since = None
            return False
        entry.lost_since = entry.lost_since or time.monotonic()
        return time.monotonic() - entry.lost_since > LOST

    def _result(self, entry: _Submitted) -> JobResult:
        errors = self._ray.exceptions
        try:
            result: JobResult = self._ray.get(entry.ref)
        except errors.TaskCancelledError:
            return JobResult("interrupted", 75, "not started")
        except errors.OutOfMemoryError as error:
            return JobResult("out of memory", None, f"Ray ended it for want of memory: {_line(error)}")
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
            return JobResult("killed", None, f"its node or worker was lost {RETRIES + 1} times: {_line(error)}")
        except errors.RayError as error:
            return JobResult("crashed", None, _line(error))
        return result

    def progress(self) -> dict[str, Progress]:
        """See `Executor`."""
        if not self._submitted:
            return {}
        _, progress = self._ray.get(self._board.all.remote())
        return {
            name: Progress(**progress[entry.number])
            for name, entry in self._submitted.items()
            if entry.number in progress
        }

    def running(self) -> int:
        """See `Executor`."""
        return len(self._submitted)

    def stop(self) -> None:
        """See `Executor`; what Ray has not started is cancelled."""
        self._ray.get(self._board.stop.remote())
        seen_on, _ = self._ray.get(self._board.all.remote())
        for entry in self._submitted.values():
            if entry.number not in seen_on:
                self._ray.cancel(entry.ref)

    def close(self) -> None:
        """See `Executor`."""
        for entry in self._submitted.values():
            self._ray.cancel(entry.ref, force=True)
        self._submitted.clear()
        self._ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Join the cluster as a driver, and keep this program's own signal handlers, which ray.init replaces."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise PipelineError(
            f"--ray {address}: no Ray cluster answers ({_line(error)})",
            remedy="is `ray start` running here, and are RAY_AUTH_MODE and the token those of the cluster? "
            "docs/batch.md",
        ) from None
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
