"""A Ray cluster of several nodes on this machine, for tests: separate `ray start` processes, to be lost one by one.

    with Cluster(tmp_path, workers=2) as cluster:
        subprocess.run([...], env=cluster.environment)
        cluster.nodes[1].kill()

The nodes live on 127.0.0.2, 127.0.0.3 and so on, so that they differ as machines do. Ray's servers listen on every
interface all the same, whatever address a node is given; what keeps others out is the token, new for each process of
tests: Ray reads it once in a process, which may join several clusters, one after the other.

All of a node's processes, and what its tasks started, carry the node's mark in their environment, so that none is
missed when the node is lost or the test ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import pytest

START_SECONDS = 60
MARK = "RAY_CLUSTER_TEST_NODE"
TOKEN = secrets.token_hex(32)

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # A node that answers no more is dead after about three seconds, not fifteen.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # What else runs on the machine that the tests run on shall kill no task.
    "RAY_memory_monitor_refresh_ms": "0",
}

# Runs in a process of its own: the tests' process keeps its signal handlers and stays without Ray's threads.
AWAIT_NODES = """
import json, logging, sys, time
import ray

ray.init(log_to_driver=False, logging_level=logging.ERROR)
wanted = json.loads(sys.argv[1])
while True:
    alive = [node for node in ray.nodes() if node["Alive"]]
    found = {name: node["NodeID"] for name in wanted for node in alive if f"node_{name}" in node["Resources"]}
    if len(found) == len(wanted):
        break
    time.sleep(0.1)
print(json.dumps(found))
"""

_libc = ctypes.CDLL(None)


def skip_without_ray() -> None:
    """Skip a test where Ray is not installed, without importing it: it reads its token when it is imported."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'fp8-pipeline[ray]'")


def _end_with_parent() -> None:
    """In a child before exec: when the tests' process is killed, `ray start --block` ends its node."""
    PR_SET_PDEATHSIG = 1
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that runs; what has ended and only waits to be reaped is left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it may end meanwhile
            state, parent, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if state not in "ZX":
                found[int(entry.name)] = (int(parent), int(session))
    return found


def _carries(pid: int, mark: str) -> bool:
    """Whether the process was started with the mark in its environment."""
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _send(pids: set[int], number: signal.Signals) -> None:
    """Signal each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Node:
    """One node: a `ray start --block`, the raylet and agents below it, its workers and whatever those started."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.id = ""  # Ray's, known when all nodes are alive
        self.log = directory / f"{name}.log"
        self._mark = f"{name}-{secrets.token_hex(8)}"
        with self.log.open("wb") as log:
            # A session of its own, and not through a shell's `&`: that would leave SIGINT ignored in every worker,
            # and `ray.cancel` without effect.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments],
                env={**environment, MARK: self._mark},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def pids(self) -> set[int]:
        """All processes of the node: by session, by parents, and by mark where the parents are gone already."""
        processes = _processes()
        found = {pid for pid, (_, session) in processes.items() if session == self.process.pid}
        found |= {pid for pid in processes if _carries(pid, self._mark)}
        while more := {pid for pid, (parent, _) in processes.items() if parent in found} - found:
            found |= more
        return found

    def freeze(self) -> None:
        """Nothing on the node runs any more, and its connections stay open: as if the network were cut."""
        frozen: set[int] = set()
        while more := self.pids() - frozen:  # what a process started before it was stopped
            _send(more, signal.SIGSTOP)
            frozen |= more

    def thaw(self) -> None:
        """The other end of `freeze`."""
        _send(self.pids(), signal.SIGCONT)

    def kill(self) -> None:
        """Lose the node: nothing on it runs any further, not even a handler that would save something."""
        deadline = time.monotonic() + 20
        while pids := self.pids():
            self.freeze()
            _send(pids | self.pids(), signal.SIGKILL)
            self.process.poll()  # reaped, it is gone from /proc
            if time.monotonic() > deadline:
                raise RuntimeError(f"node {self.name}: processes {sorted(pids)} outlive SIGKILL")
            time.sleep(0.02)
        self.process.wait()


class Cluster:
    """One head and some workers.

    The head has no CPUs unless `head_cpus` says so: tasks run on the workers, actors with `num_cpus=0` anywhere. Each
    worker has `resources`, and every node one of `node_NAME` (`node_head`, `node_worker1`, ...) to aim a task at it.
    `environment` adds to what the nodes and drivers are given, or replaces it. The nodes' output goes to `directory`.
    """

    def __init__(
        self,
        directory: Path,
        workers: int = 2,
        cpus: int = 1,
        head_cpus: int = 0,
        resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.workers = workers
        self.cpus = cpus
        self.head_cpus = head_cpus
        self.resources = {"nvme_gb": 50.0} if resources is None else dict(resources)
        self.address = ""
        self.nodes: list[Node] = []  # the head first
        self.token = directory / "token"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**kept, **SETTINGS, "RAY_AUTH_TOKEN_PATH": str(self.token), **(environment or {})}
        self._scratch: Path | None = None
        self._turn: IO[bytes] | None = None

    def __enter__(self) -> Cluster:
        # One cluster at a time: addresses and ports are this machine's, also where two processes run tests.
        self._turn = (Path(tempfile.gettempdir()) / f"ray-cluster-tests-{os.getuid()}.lock").open("wb")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def node(self, node_id: str) -> Node:
        """The node that Ray knows by this id."""
        return next(node for node in self.nodes if node.id == node_id)

    def close(self) -> None:
        """End every process and remove what they wrote outside `directory`."""
        try:
            for node in reversed(self.nodes):
                node.kill()
        finally:
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
            if self._turn is not None:
                self._turn.close()

    def _start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.token.touch(mode=0o600)
        self.token.write_text(TOKEN)
        # Sockets lie below, and a socket's path has room for 107 bytes; a test's own directory is too deep.
        self._scratch = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        # Port 0: a free one that Ray finds itself, so that two clusters never race for it.
        head = self._add("head", ["--head", "--port=0", "--include-dashboard=false"], self.head_cpus, {})
        self.address = self._head_address(head)
        self.environment["RAY_ADDRESS"] = self.address
        for number in range(1, self.workers + 1):
            self._add(f"worker{number}", [f"--address={self.address}"], self.cpus, self.resources)
        self._await_nodes()

    def _add(self, name: str, arguments: list[str], cpus: int, resources: Mapping[str, float]) -> Node:
        assert self._scratch is not None
        arguments = [
            *arguments,
            f"--node-ip-address=127.0.0.{2 + len(self.nodes)}",
            f"--num-cpus={cpus}",
            "--num-gpus=0",
            f"--resources={json.dumps({**resources, f'node_{name}': 1})}",
            "--object-store-memory=80000000",  # the least that it takes, nearly
            f"--temp-dir={self._scratch / name}",
            "--include-log-monitor=false",
            "--disable-usage-stats",
        ]
        node = Node(name, arguments, self.environment, self.directory)
        self.nodes.append(node)
        return node

    def _head_address(self, head: Node) -> str:
        """Where the head listens: it writes that down once it does."""
        assert self._scratch is not None
        path = self._scratch / head.name / "ray_current_cluster"
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(FileNotFoundError):
                if address := path.read_text().strip():
                    return address
            if head.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head node did not start:\n{head.log.read_text()}")
            time.sleep(0.05)

    def _await_nodes(self) -> None:
        command = [sys.executable, "-c", AWAIT_NODES, json.dumps([node.name for node in self.nodes])]
        log = self.directory / "await.log"
        deadline = time.monotonic() + START_SECONDS
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.directory, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline or any(node.process.poll() is not None for node in self.nodes):
                    raise RuntimeError(f"not all nodes started:\n{self._logs()}")
                time.sleep(0.05)
        finally:
            process.kill()
            output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the cluster cannot be reached:\n{log.read_text()}\n{self._logs()}")
        found = json.loads(output.splitlines()[-1])
        for node in self.nodes:
            node.id = found[node.name]

    def _logs(self) -> str:
        return "\n".join(f"--- {node.name}\n{node.log.read_text()}" for node in self.nodes)
