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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from pipeline.batch.planning import Facts
from pipeline.errors import PipelineError
from pipeline.machine.processes import die_with_parent

ATTEMPTS = 3
PAUSE = 30.0  # seconds between two attempts; what has arrived is kept


@dataclass
class State:
    """Of one source's download.

    Attributes:
        done: it is in the cache.
        error: why it never will be, in this night.
        kind: the class of that failure.
    """

    done: bool = False
    error: str | None = None
    kind: str = "source"
    attempts: int = 0
    not_before: float = 0.0
    short_since: float | None = None


@dataclass
class Fetcher:
    """One download at a time, in the order in which jobs will want their sources."""

    directory: Path
    has_room: Callable[[Path, int], bool]
    pause: float = PAUSE
    _states: dict[tuple[str, str | None], State] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _at: tuple[str, str | None] | None = None
    _claim: tuple[Path, int] | None = None

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def state(self, facts: Facts) -> State:
        """Of a job's source."""
        return self._states.setdefault((facts.source, facts.revision), State())

    def wants(self, waiting: Sequence[Facts], disk_wait: float) -> None:
        """Go on with the downloads. Does not wait.

        Args:
            waiting: jobs in their order.
            disk_wait: seconds that a download waits for space in the cache.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._take(self._process.returncode)
        for facts in waiting:
            state = self.state(facts)
            if not facts.to_fetch or state.done or state.error is not None or time.monotonic() < state.not_before:
                continue
            if not self.has_room(cache(), facts.to_fetch):
                state.short_since = state.short_since or time.monotonic()
                if time.monotonic() - state.short_since >= disk_wait:
                    state.kind = "disk"
                    state.error = (
                        f"{cache()}: too little space for the download of {facts.source}, {facts.to_fetch / 1e9:.2f} GB"
                    )
                continue
            state.short_since = None
            self._begin(facts)
            return

    def claim(self) -> tuple[Path, int] | None:
        """Where a download goes, and how many bytes it will have there; None while there is none."""
        return self._claim if self._process is not None else None

    def _begin(self, facts: Facts) -> None:
        self._at, self._claim = (facts.source, facts.revision), (cache(), facts.to_fetch)
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


def cache() -> Path:
    """Where huggingface_hub puts what it fetches."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def main(path: str) -> int:
    """Bring a checkpoint into the cache."""
    from pipeline.checkpoint import hub

    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))  # its threads would be waited for else
    die_with_parent(asked["parent"])
    try:
        hub.resolve(asked["source"], asked["revision"])
    except PipelineError as error:
        print(f"error: {error}", flush=True)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
