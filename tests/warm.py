"""Processes that begin with what takes seconds to import: each forked from one that has imported it.

In all else they are processes as a shell starts them: arguments, environment, directory, output, exit status and
signals are their own. Two exceptions: a peak of memory counts what the imports took, and a variable that a library
reads while it is imported is the one of the first process. Nothing of ours is imported there.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A request is a line; for each a process is forked, which waits for another one, and that one runs the code.
SERVER = """
import atexit, gc, importlib, json, os, signal, sys, threading, traceback
for name in sys.argv[2:]:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a collection would copy its memory into each fork
place = sys.argv[1]
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the tests
for line in sys.stdin:
    request = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        break
    for name, wait in (("pid", lambda: pid), ("status", lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))):
        value = wait()
        with open(f"{place}/{request['number']}.tmp", "w") as file:
            file.write(str(value))
        os.rename(file.name, f"{place}/{request['number']}.{name}")
    os._exit(0)
else:
    sys.exit()
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["directory"])
for number, name in ((0, os.devnull), (1, f"{place}/{request['number']}.out"), (2, f"{place}/{request['number']}.err")):
    file = os.open(name, os.O_RDWR | os.O_APPEND)
    os.dup2(file, number)
    os.close(file)
sys.argv = ["-c", *request["arguments"]]
sys.path[0] = ""
code = compile(request["code"], "<string>", "exec")
del file, line, name, number, pid, place, request
status = 0
try:
    exec(code, {"__name__": "__main__"})
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
except BaseException:
    status = 1
    traceback.print_exc()
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # to take down all that was imported would take longer than most runs do
"""
COMMAND_LINE = "import sys; from pipeline.cli import main; main(sys.argv[1:], prog_name='quantize')"


class Process:
    """One that was started, with as much of `subprocess.Popen` as the tests use."""

    def __init__(self, server: subprocess.Popen[str], place: Path, number: int, arguments: list[str]) -> None:
        self._server, self._place, self._number, self.args = server, place, number, arguments
        self.returncode: int | None = None
        self.pid = int(self._wait("pid", 600.0))

    def _file(self, name: str) -> Path:
        return self._place / f"{self._number}.{name}"

    def _wait(self, name: str, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while not self._file(name).exists():
            assert self._server.poll() is None, "the process with the imports has ended"
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, seconds)
            time.sleep(0.005)
        return self._file(name).read_text()

    def until(self, beginning: str) -> None:
        """Waits for a line of its output."""
        while not any(line.startswith(beginning) for line in self._file("out").read_text().splitlines()):
            assert self.poll() is None, f"it ended: {self.communicate()}"
            time.sleep(0.005)

    def poll(self) -> int | None:
        if self.returncode is None and self._file("status").exists():
            self.returncode = int(self._file("status").read_text())
        return self.returncode

    def send_signal(self, kind: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, kind)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 600.0) -> tuple[str, str]:
        """Waits for its end; what it said."""
        try:
            self._wait("status", timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.poll()
        return self._file("out").read_text(errors="replace"), self._file("err").read_text(errors="replace")


class Warm:
    """Starts such processes, and runs the command line as one."""

    def __init__(self, *modules: str, environment: Mapping[str, str] | None = None) -> None:
        if Path("/dev/nvidiactl").exists():
            modules = ()  # what begins to use a GPU while it is imported cannot be forked: each imports for itself
        self._modules, self._environment = modules, environment or {}
        self._server: subprocess.Popen[str] | None = None
        self._numbers = itertools.count()

    def __enter__(self) -> Warm:
        self._temporary = tempfile.TemporaryDirectory(prefix="warm-")
        self._place = Path(self._temporary.name)
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()
        self._temporary.cleanup()

    def start(self, *arguments: object, code: str = COMMAND_LINE, **options: Any) -> Process:
        """A process that runs, with ``env`` (besides this one's environment) and ``cwd``."""
        if self._server is None:
            command = [sys.executable, "-c", SERVER, self._place, *self._modules]
            log = (self._place / "server.log").open("w")
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
                env={**os.environ, **self._environment},
            )  # fmt: skip
        assert self._server.stdin is not None
        number, words = next(self._numbers), [str(argument) for argument in arguments]
        request = {
            "number": number, "arguments": words, "code": code,
            "environment": {**os.environ, **self._environment, **options.pop("env", {})},
            "directory": str(options.pop("cwd", None) or Path.cwd()),
        }  # fmt: skip
        assert not options, options
        for name in ("out", "err"):
            (self._place / f"{number}.{name}").touch()
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Process(self._server, self._place, number, words)

    def __call__(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs one to its end."""
        process = self.start(*arguments, **options)
        out, err = process.communicate()
        assert process.returncode is not None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
