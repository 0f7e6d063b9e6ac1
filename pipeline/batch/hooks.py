"""The user's own commands, which a batch starts when a job fails and when the batch ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

SECONDS = 60  # after which a command is ended
MOST_TEXT = 8192  # characters of a variable; the kernel limits the size of an environment


class Hooks:
    """Shell commands that run beside the jobs. What they do never makes the batch fail or wait."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` reports to the user how commands ended, if not well."""
        self._say = say
        self._running: list[tuple[subprocess.Popen[bytes], str, float]] = []

    def start(self, command: str | None, variables: Mapping[str, str]) -> None:
        """Start a command with more environment variables; None: there is none to start."""
        if not command:
            return
        texts = {key: value.replace("\0", " ")[:MOST_TEXT] for key, value in variables.items()}
        try:
            process = subprocess.Popen(
                command,
                shell=True,
                env={**os.environ, **texts},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            self._say(f"note: {command!r} could not be run: {error}")
            return
        self._running.append((process, command, time.monotonic() + SECONDS))

    def check(self) -> bool:
        """Report the commands that failed, and end those that take too long; returns whether any still runs."""
        for entry in list(self._running):
            process, command, deadline = entry
            status = process.poll()
            if status is None and time.monotonic() < deadline:
                continue
            self._running.remove(entry)
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._say(f"note: {command!r} took more than {SECONDS} s and was ended")
            elif status:
                self._say(f"note: {command!r} ended with status {status}")
        return bool(self._running)
