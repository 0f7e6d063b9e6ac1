"""Runs jobs in vLLM: ``VLLM_PYTHON pipeline/vllm_env/jobs DIRECTORY PARENT``, as worker.py starts it.

vLLM is imported once. Then, one after the other, the files ``jobs-1``, ``jobs-2``... are waited for in DIRECTORY, done
and removed; each is ``{"parallel": N, "jobs": [{"kind": KIND, "out": PATH, "seconds": S, ...}]}``, where the kinds are
load, generate, throughput and arguments. Every job is a fork of this process, so that none sees what another left
behind: vLLM says most warnings once a process, and keeps its parallel state in globals. A job writes its result, a JSON
object, to ``out`` and all it prints to ``out`` + ".log". A job that dies leaves
``{"error": ..., "lost": true}``, which is not vLLM's own word on the checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# Make `pipeline...` importable by its full name without the environment that it is installed in: that one holds the
# quantizers' torch and transformers, whose pins contradict vLLM's.
for _name, _place in (("pipeline", HERE.parents[1]), ("pipeline.vllm_env", HERE.parent)):
    if _name not in sys.modules:
        _package = types.ModuleType(_name)
        _package.__path__ = [str(_place)]
        sys.modules[_name] = _package

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # W8A16 with AMX fails where a linear has a bias (0.32.0); without it W8A8 runs, which uses input_scale.
    "VLLM_DISABLED_KERNELS": "CPUFp8PerTensorScaledMMLinearKernel",
}


def main(directory: str, parent: int) -> None:
    """Run jobs until whoever started this ends it, or is gone; see the module's text.

    Args:
        directory: where jobs come and results go.
        parent: the process that started this; what it names as vLLM's Python may be a script between the two.
    """
    _die_with_parent(os.getppid())
    for key, value in SETTINGS.items():
        os.environ[key] = value
    begin = time.monotonic()
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader  # noqa: F401  # once here, and not again in every job

    imports = time.monotonic() - begin
    number = 1
    while Path(directory).is_dir() and _is_there(parent):
        asked = Path(directory) / f"jobs-{number}"
        if not asked.exists():
            time.sleep(0.02)
            continue
        work = json.loads(asked.read_text())
        _run_all([{**job, "imports": imports} for job in work["jobs"]], work["parallel"])
        asked.unlink()
        number += 1


def _run_all(waiting: list[dict[str, Any]], parallel: int) -> None:
    running: dict[int, tuple[dict[str, Any], float]] = {}
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.pop(0)
            running[_start(job)] = (job, time.monotonic() + job["seconds"])
        for pid, (job, deadline) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = not ended and time.monotonic() > deadline
            if late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if ended or late:
                del running[pid]
                if not Path(job["out"]).exists():
                    _write(job["out"], {"error": _epitaph(job, status, late), "lost": True, "cut_off": True})
        time.sleep(0.02)


def _start(job: dict[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        import torch

        _die_with_parent(parent)
        if job["kind"] in ("load", "arguments"):  # no arithmetic to speak of, and several run at once
            torch.set_num_threads(1)
        log = os.open(job["out"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _write(job["out"], _run(job))
        status = 0
    except BaseException as error:
        traceback.print_exc()
        lost = job["kind"] in ("load", "arguments")  # which catch what vLLM itself says
        _write(job["out"], {"error": _sentence(error), "lost": lost, **_facts(job, error)})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    if job["kind"] == "load":
        from pipeline.vllm_env.jobs import load

        return load.check(job)
    if job["kind"] == "generate":
        from pipeline.vllm_env.jobs import generate

        return generate.run(job)
    if job["kind"] == "throughput":
        from pipeline.vllm_env.jobs import throughput

        return throughput.run(job)
    from pipeline.vllm_env.jobs import arguments

    return arguments.check(job)


def _facts(job: dict[str, Any], error: BaseException) -> dict[str, Any]:
    """Where an engine's exception comes from, and what vLLM's registries know of the checkpoint."""
    if job["kind"] != "generate":
        return {}
    from pipeline.vllm_env.jobs import origin

    return {"raised": origin.of(error, "engine"), **origin.registered(Path(job["checkpoint"]))}


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:3])[:500]}" if lines else type(error).__name__


def _epitaph(job: dict[str, Any], status: int, late: bool) -> str:
    if late:
        return f"it did not end within {job['seconds']:.0f} s"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = " (is there enough memory?)" if number == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(number).name}{why}"
    return f"its process ended with status {os.waitstatus_to_exitcode(status)} and said nothing"


def _write(path: str, result: dict[str, Any]) -> None:
    temporary = Path(path + ".tmp")
    temporary.write_text(json.dumps(result))
    temporary.replace(path)


def _die_with_parent(parent: int) -> None:
    """Ask Linux to end this process when `parent`, which started it, dies (man 2 prctl, PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)


def _is_there(pid: int) -> bool:
    """Whether a process runs: one that was gone before `_die_with_parent` sends no signal any more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
