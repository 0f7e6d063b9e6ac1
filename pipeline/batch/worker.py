"""The processes of this package that a batch starts: each reads a request file and ends with the process it serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.machine.processes import die_with_parent


def start_worker(
    module: str, request: Path, data: Mapping[str, Any], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE REQUEST`` in a session of its own.

    Args:
        module: its main part calls `read_request`.
        request: the file to write `data` into.
        data: plain data for JSON.
        log: what the process prints is appended here.
        environment: None: that of this process.

    Raises:
        OSError: a file cannot be written, or no process can be made.
    """
    request.write_text(json.dumps({"parent": os.getpid(), **data}), encoding="utf-8")
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(request)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True,
        )  # fmt: skip


def read_request(path: str | Path) -> dict[str, Any]:
    """The data of a request file; from now on this process gets SIGTERM when the one that started it ends."""
    data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    die_with_parent(data.pop("parent"))
    return data


def end_worker(process: subprocess.Popen[bytes], seconds: float | None = None) -> None:
    """Ask a process to end if it runs, and wait for it; after `seconds` it is killed."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
