"""Jobs as tasks of a Ray cluster: Ray places them by their CPUs, GPU, memory and disk, and runs them again elsewhere
when a node is lost.

A task starts the same process as the local executor does, and tells a board (an actor on the batch's own node) how far
it is. What a lost node had begun goes on from the journal where its output is on shared storage, and starts over where
it was on the node's own drive.
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
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.batch.executor import how_ended, share_gpu, timed
from pipeline.batch.job import Asked, Ending, ask
from pipeline.batch.planning import Facts
from pipeline.batch.progress import Follower, Progress
from pipeline.errors import PipelineError, UsageError
from pipeline.machine.processes import oom_kills
from pipeline.units import size_text

DISK = "nvme_gb"  # the resource in which nodes say how much of their drive conversions may take
RETRIES = 5  # nodes that a job may lose in one attempt
TELL = 1.0  # seconds between two words to the board
LOST = 15.0  # seconds after which a node that the cluster has given up takes its job with it
LOG_BYTES = 256 << 10  # of a log that are brought home from a node without shared storage
MARK = "mark"
SETTINGS = {  # of Ray, for this driver
    "RAY_task_oom_retries": "0",  # what its memory monitor ends comes back to the queue; Ray would retry it for ever
    "RAY_grpc_client_keepalive_time_ms": "5000",  # a node that is cut off is noticed, not waited for
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


class Board:
    """What the tasks say, and whether they shall stop; an actor. One that Ray had to start anew knows nothing."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.stopping = False

    def begins(self, job: str, submitted: int, node: dict[str, str]) -> None:
        """A task runs, for the first time or again."""
        known = self.jobs.get(job)
        if known is None or known["submitted"] != submitted:
            known = self.jobs[job] = {"submitted": submitted, "nodes": [], "progress": None}
        known["nodes"].append(node)

    def tell(self, job: str, submitted: int, progress: dict[str, Any]) -> bool:
        """How far a job is; returns whether it shall stop."""
        known = self.jobs.setdefault(job, {"submitted": submitted, "nodes": [], "progress": None})
        if known["submitted"] == submitted:
            known["progress"] = progress
        return self.stopping

    def stop(self) -> None:
        """All jobs shall stop at their unit's end."""
        self.stopping = True

    def all(self) -> dict[str, dict[str, Any]]:
        """What every job has said."""
        return self.jobs


def task(asked: Asked, facts: Facts, place: str, mark: str, per_gpu: int, submitted: int, board: Any) -> Ending:
    """A job on whichever node Ray chose: start its process, tell the board, end with it."""
    import ray

    context = ray.get_runtime_context()
    node = {"id": context.get_node_id(), "name": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"}
    ray.get(board.begins.remote(asked.job, submitted, node))
    directory = Path(place)
    shared = _reads(directory.parents[1] / MARK) == mark
    if not shared:
        directory = Path(tempfile.gettempdir()) / f"fp8-batch-{os.getuid()}" / mark / asked.job
    if facts.gpu and ray.get_gpu_ids():
        asked = share_gpu(asked, per_gpu)
    command, kills = ask(asked, directory, os.getpid()), oom_kills()
    follower = Follower(Path(facts.output), facts.read_bytes + facts.layer_bytes, time.time())
    log_path = directory / "log.txt"
    before = log_path.stat().st_size if log_path.exists() else 0
    with log_path.open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        told = False
        while process.poll() is None:
            if ray.get(board.tell.remote(asked.job, submitted, asdict(follower.now()))) and not told:
                process.terminate()  # once: a second signal would cut the unit
                told = True
            _wait(process, TELL)
    finally:
        if process.poll() is None:  # cancelled, or the board is lost for good
            process.terminate()
            process.wait()
    ending = how_ended(process.returncode, directory, oom_kills() > kills)
    timed(ending, facts, follower)
    ending.node, ending.shared = node["name"], shared
    if not shared:
        with log_path.open("rb") as file:
            file.seek(max(before, log_path.stat().st_size - LOG_BYTES))
            ending.log = file.read().decode("utf-8", errors="replace")
    return ending


def _reads(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


@dataclass
class _Submitted:
    ref: Any
    number: int
    lost_since: float | None = None


@dataclass
class RayCluster:
    """A Ray cluster that runs already; `address` as ``ray start`` printed it, or ``auto``.

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
            raise UsageError("--ray: Ray is not installed; pip install 'fp8-pipeline[ray]' on every node") from None
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

    def needs(self, facts: Facts) -> dict[str, float]:
        """The resources of a job's task, as Ray names them; GPU and disk where nodes declare any."""
        declared = [node["Resources"] for node in self._nodes()]
        cores = max((resources.get("CPU", 0.0) for resources in declared), default=0.0)
        found = {"CPU": max(1.0, min(float(facts.threads), cores)), "memory": float(facts.peak_memory)}
        if facts.gpu and any(resources.get("GPU") for resources in declared):
            found["GPU"] = 1.0 / self.per_gpu
        if any(DISK in resources for resources in declared):
            found[DISK] = float(math.ceil(facts.disk / 10**9))
        return found

    def refuses(self, facts: Facts) -> str | None:
        """See `Executor`: a task that no node can ever hold would wait for ever, and Ray would not say so."""
        needs, nodes = self.needs(facts), self._nodes()
        if any(all(node["Resources"].get(key, 0.0) >= value for key, value in needs.items()) for node in nodes):
            return None
        text = ", ".join(
            f"{size_text(value)} of memory" if key == "memory" else f"{value:g} {key}" for key, value in needs.items()
        )
        return f"no node of the cluster has all of {text}"

    def wants(self, facts: Facts) -> str | None:
        """See `Executor`; Ray itself decides when a task starts."""
        return None

    def start(self, asked: Asked, facts: Facts, place: Path) -> None:
        """See `Executor`."""
        needs = self.needs(facts)
        self._count += 1
        place.mkdir(parents=True, exist_ok=True)
        mark = _reads(place.parents[1] / MARK)
        if mark is None:  # by which a node knows that it sees this directory, and not one of the same name
            mark = secrets.token_hex(8)
            (place.parents[1] / MARK).write_text(mark, encoding="ascii")
        ref = self._task.options(
            name=asked.job,
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            memory=int(needs["memory"]),
            resources={DISK: needs[DISK]} if DISK in needs else None,
            max_retries=RETRIES,
        ).remote(asked, facts, str(place), mark, self.per_gpu, self._count, self._board)
        self._submitted[asked.job] = _Submitted(ref, self._count)

    def ended(self) -> list[tuple[str, Ending]]:
        """See `Executor`."""
        if not self._submitted:
            return []
        refs = [entry.ref for entry in self._submitted.values()]
        ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        said = self._ray.get(self._board.all.remote()) if ready or self._due() else None
        found = []
        for name, entry in list(self._submitted.items()):
            nodes = self._seen_on(said, name, entry)
            if entry.ref in ready:
                ending = self._result(entry)
            elif said is not None and self._is_lost(entry, nodes):
                self._ray.cancel(entry.ref, force=True)
                ending = Ending("killed", None, f"its node {nodes[-1]['name']} was lost", nodes[-1]["name"])
            else:
                continue
            del self._submitted[name]
            for before, after in pairwise(nodes):
                ending.notes.append(f"its process or node was lost at {before['name']}; taken up at {after['name']}")
            found.append((name, ending))
        return found

    def _due(self) -> bool:
        """Every few seconds it is time to look for lost nodes."""
        now = time.monotonic()
        if now - self._looked < LOST / 5:
            return False
        self._looked = now
        return True

    @staticmethod
    def _seen_on(said: dict[str, Any] | None, name: str, entry: _Submitted) -> list[dict[str, str]]:
        known = (said or {}).get(name)
        return list(known["nodes"]) if known is not None and known["submitted"] == entry.number else []

    def _is_lost(self, entry: _Submitted, nodes: list[dict[str, str]]) -> bool:
        """A node that is cut off, not dead, keeps its task's connection open: Ray would wait for it."""
        alive = {node["NodeID"] for node in self._nodes()}
        if not nodes or nodes[-1]["id"] in alive:
            entry.lost_since = None
            return False
        entry.lost_since = entry.lost_since or time.monotonic()
        return time.monotonic() - entry.lost_since > LOST

    def _result(self, entry: _Submitted) -> Ending:
        errors = self._ray.exceptions
        try:
            ending: Ending = self._ray.get(entry.ref)
        except errors.TaskCancelledError:
            return Ending("interrupted", 75, "not started")
        except errors.OutOfMemoryError as error:
            return Ending("out of memory", None, f"Ray ended it for want of memory: {_line(error)}")
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
            return Ending("killed", None, f"its node or worker was lost {RETRIES + 1} times: {_line(error)}")
        except errors.RayError as error:
            return Ending("crashed", None, _line(error))
        return ending

    def progress(self) -> dict[str, Progress]:
        """See `Executor`."""
        if not self._submitted:
            return {}
        said = self._ray.get(self._board.all.remote())
        return {
            name: Progress(**said[name]["progress"])
            for name, entry in self._submitted.items()
            if self._seen_on(said, name, entry) and said[name]["progress"] is not None
        }

    def running(self) -> int:
        """See `Executor`."""
        return len(self._submitted)

    def stop(self) -> None:
        """See `Executor`; what Ray has not started is taken back."""
        self._ray.get(self._board.stop.remote())
        said = self._ray.get(self._board.all.remote())
        for name, entry in self._submitted.items():
            if not self._seen_on(said, name, entry):
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
            f"--ray {address}: no Ray cluster answers ({_line(error)}); is `ray start` running here, and are "
            "RAY_AUTH_MODE and the token those of the cluster? docs/overnight.md"
        ) from None
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
