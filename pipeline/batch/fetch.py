"""Downloads of hub checkpoints, one at a time, while other jobs run; one a source, however many jobs need it.

python -m pipeline.batch.fetch ASKED.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pipeline.batch.planning import Facts
from pipeline.batch.processes import die_with_parent
from pipeline.errors import PipelineError

ATTEMPTS = 3
PAUSE = 30.0  # seconds between two attempts; what has arrived is kept


@dataclass
class State:
    """Of one source's download.

    Attributes:
        done: it is in the cache.
        error: why it never will be, in this night.
    """

    done: bool = False
    error: str | None = None
    attempts: int = 0
    not_before: float = 0.0


@dataclass
class Fetcher:
    """One download at a time, in the order in which jobs will want their sources."""

    directory: Path
    pause: float = PAUSE
    _states: dict[tuple[str, str | None], State] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _at: tuple[str, str | None] | None = None

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def state(self, facts: Facts) -> State:
        """Of a job's source."""
        return self._states.setdefault((facts.source, facts.revision), State())

    def wants(self, waiting: Sequence[Facts]) -> None:
        """Go on with the downloads; `waiting` jobs in their order. Does not wait."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._take(self._process.returncode)
        for facts in waiting:
            state = self.state(facts)
            if facts.to_fetch and not state.done and state.error is None and time.monotonic() >= state.not_before:
                self._begin(facts)
                return

    def _begin(self, facts: Facts) -> None:
        self._at = facts.source, facts.revision
        asked = self.directory / "fetch.json"
        asked.write_text(json.dumps({"parent": os.getpid(), "source": facts.source, "revision": facts.revision}))
        with (self.directory / "fetch.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.batch.fetch", str(asked)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _take(self, status: int) -> None:
        assert self._at is not None
        state = self._states[self._at]
        state.attempts += 1
        self._process = None
        if status == 0:
            state.done = True
            return
        lines = (self.directory / "fetch.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if state.attempts >= ATTEMPTS:
            state.error = lines[-1].removeprefix("error: ") if lines else f"the download ended with status {status}"
        state.not_before = time.monotonic() + self.pause


def main(path: str) -> int:
    """Bring a checkpoint into the cache."""
    from pipeline.checkpoint import hub

    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    die_with_parent(asked["parent"])
    try:
        hub.resolve(asked["source"], asked["revision"])
    except PipelineError as error:
        print(f"error: {error}", flush=True)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
