"""Downloads of hub checkpoints, one at a time, while other jobs run; one per source, however many jobs need it.

python -m pipeline.batch.fetch DIRECTORY/fetch.json
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.batch.planning import JobPlan
from pipeline.batch.worker import end_worker, read_request, start_worker
from pipeline.errors import PipelineError

ATTEMPTS = 3


@dataclass
class Download:
    """The state of one source's download.

    Attributes:
        source: a hub id.
        revision: its commit.
        done: it is in the cache.
        error: why it will not arrive in this run of the batch; None: it may.
        kind: the failure class of `error`.
        attempts: how many have failed or succeeded.
        not_before: the time, by the monotonic clock, before which it is not tried again.
        short_since: since when the cache has had too little space for it, by the monotonic clock.
    """

    source: str
    revision: str | None
    done: bool = False
    error: str | None = None
    kind: str = "source"
    attempts: int = 0
    not_before: float = 0.0
    short_since: float | None = None


class Fetcher:
    """One download at a time, in the order in which jobs will want their sources.

    Attributes:
        pause: seconds between two attempts; what has arrived is kept.
    """

    pause = 30.0

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._downloads: dict[tuple[str, str | None], Download] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._current: Download | None = None
        self._claim: tuple[Path, int] | None = None

    def download(self, plan: JobPlan) -> Download:
        """The download of a job's source."""
        key = (plan.source, plan.revision)
        return self._downloads.setdefault(key, Download(*key))

    def go_on(self, waiting: Sequence[JobPlan], has_room: Callable[[Path, int], bool], disk_wait: float) -> None:
        """Take what ended, and start the next download if none runs. Does not wait.

        Args:
            waiting: the plans of the jobs that may start, in their order.
            has_room: whether a directory's drive has room for so many bytes.
            disk_wait: seconds that a download waits for space in the cache.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._take(self._process.returncode)
        for plan in waiting:
            download = self.download(plan)
            settled = not plan.to_fetch or download.done or download.error is not None
            if settled or time.monotonic() < download.not_before:
                continue
            if has_room(cache(), plan.to_fetch):
                download.short_since = None
                self._begin(download, plan.to_fetch)
                return
            download.short_since = download.short_since or time.monotonic()
            if time.monotonic() - download.short_since >= disk_wait:
                download.kind = "disk"
                size = f"{plan.to_fetch / 1e9:.2f} GB"
                download.error = f"{cache()}: too little space for the download of {plan.source}, {size}"

    @property
    def claim(self) -> tuple[Path, int] | None:
        """Where the current download goes, and how many bytes it will have there; None while there is none."""
        return self._claim if self._process is not None else None

    def close(self) -> None:
        """End the current download; what has arrived is kept."""
        if self._process is not None:
            end_worker(self._process, seconds=5)

    def _begin(self, download: Download, nbytes: int) -> None:
        self._current, self._claim = download, (cache(), nbytes)
        wanted = {"source": download.source, "revision": download.revision}
        request, log = self._directory / "fetch.json", self._directory / "fetch.log"
        self._process = start_worker("pipeline.batch.fetch", request, wanted, log)

    def _take(self, status: int) -> None:
        assert self._current is not None
        download = self._current
        download.attempts += 1
        self._process = None
        if status == 0:
            download.done = True
            return
        lines = (self._directory / "fetch.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if download.attempts >= ATTEMPTS:
            download.error = lines[-1].removeprefix("error: ") if lines else f"the download ended with status {status}"
        download.not_before = time.monotonic() + self.pause


def cache() -> Path:
    """Where huggingface_hub puts what it fetches."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def main(path: str) -> int:
    """Bring the checkpoint that a request file names into the cache; returns the exit status."""
    from pipeline.checkpoint import hub

    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))  # an ordinary exit would wait for its threads
    wanted = read_request(path)
    try:
        hub.resolve(wanted["source"], wanted["revision"])
    except PipelineError as error:
        print(f"error: {error}", flush=True)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
