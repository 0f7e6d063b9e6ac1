"""Signals that ask a run to stop: at once, at the end of a unit, or not while it publishes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """SIGINT, SIGTERM and SIGHUP: at once, or while streaming at the end of a unit, or never while publishing."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.error: Exception | None = None  # of `request`; None where a signal came first
        self.forced = False
        self.number: int | None = None  # of the first signal that waits or waited
        self._deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        # a terminal that is closed may send SIGHUP twice, and nobody has grown impatient
        if not self._deferred or (self.number is not None and number != signal.SIGHUP):
            self.forced = True
            raise KeyboardInterrupt
        if self.number is None and os.isatty(2):  # written past Python's buffers, which a handler may find half full
            os.write(
                2, b"\nstopping at the end of what is under way, so that nothing is lost; once more ends it at once\n"
            )
        self.number = self.number or number
        self.requested.set()

    def request(self, error: Exception) -> None:
        """Ask for an end as a signal does, from any thread; whoever ends then raises `error`."""
        if not self.requested.is_set():
            self.error = error
            self.requested.set()

    def hold(self) -> None:
        """From now on a signal waits; the second one still ends everything."""
        self._deferred = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal asks for an end; only a second one forces it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within, SIGINT, SIGTERM and SIGHUP go to the `Stop` that is yielded; signals that are ignored stay ignored."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield stop
    except Exception:
        if stop.forced:  # within an import, for instance, KeyboardInterrupt becomes an error of the library's
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
