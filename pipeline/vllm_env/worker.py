"""A process of vLLM's own Python that runs jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.vllm_env.environment import VllmEnvironment

JOBS = Path(__file__).with_name("jobs")


class VllmWorker:
    """A process of vLLM's Python, with vLLM imported, that runs jobs; see vllm_env/jobs/__main__.py.

    It starts with `begin`, or with the first jobs, and ends with the context. Within a ``with`` block::

        with VllmWorker(environment) as worker:
            loaded, answered = worker.run([load_job, engine_job], parallel=2)
    """

    def __init__(self, environment: VllmEnvironment) -> None:
        self.environment = environment
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._rounds = 0

    def __enter__(self) -> VllmWorker:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # with its jobs, which are of its session
            self._process.wait()
        if self._place is not None:
            self._place.cleanup()

    def begin(self) -> VllmWorker:
        """Start importing vLLM, which takes seconds, while the caller does something else."""
        if self._process is None:
            self._place = tempfile.TemporaryDirectory(prefix="in-vllm-")
            with (Path(self._place.name) / "said.log").open("wb") as log:
                # a session of its own: a terminal's Ctrl-C reaches this process alone, which then ends the jobs
                self._process = subprocess.Popen(
                    [self.environment.python, JOBS, self._place.name, str(os.getpid())],
                    stdout=log, stderr=log, cwd=self._place.name, start_new_session=True,
                    env={**os.environ, "TMPDIR": self._place.name},  # what vLLM leaves there goes with it
                )  # fmt: skip
        return self

    def run(self, jobs: Sequence[Mapping[str, Any]], parallel: int = 1, seconds: float = 600.0) -> list[dict[str, Any]]:
        """Run jobs and wait for them.

        Args:
            jobs: without ``out`` and ``seconds``.
            parallel: how many at once.
            seconds: how long one may take.

        Returns:
            A result a job. One that could not be run is ``{"error": a sentence, "log": the end of its output}``. With
            ``lost: true`` the error says nothing about the checkpoint: time or memory ran out (then ``cut_off: true``,
            too), or vLLM itself did not start (then ``started: false``, too).
        """
        self.begin()
        assert self._place is not None and self._process is not None
        self._rounds += 1
        place = Path(self._place.name)
        outs = [place / f"{self._rounds}-{number}.json" for number in range(len(jobs))]
        whole = [{**job, "out": str(out), "seconds": seconds} for job, out in zip(jobs, outs, strict=True)]
        asked = place / f"jobs-{self._rounds}"
        asked.with_suffix(".tmp").write_text(json.dumps({"parallel": parallel, "jobs": whole}))
        asked.with_suffix(".tmp").replace(asked)
        deadline = time.monotonic() + seconds * len(jobs) + 120
        while asked.exists() and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return [_result(out, place / "said.log") for out in outs]


def _result(out: Path, said: Path) -> dict[str, Any]:
    if out.exists():
        result: dict[str, Any] = json.loads(out.read_text())
        if result.get("error"):
            result["log"] = _end(out.with_name(out.name + ".log"))
        return result
    lines = _end(said).splitlines()
    error = f"vLLM did not start: {lines[-1] if lines else 'it said nothing'}"
    return {"error": error, "log": "\n".join(lines), "lost": True, "started": False}


def _end(path: Path, lines: int = 30) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
