"""What other libraries say while this program works: kept for the run's record, and never on the terminal.

Log lines of any logger, Python's warnings, loguru's lines, and what is printed within `quiet`. A run collects from its
first import on and writes what it collected to its events, as ``library_message`` with the module, the level and the
text, each once. Commands that leave no record drop them. Errors still raise.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MOST = 200  # different messages of a run; a library that counts in its messages would fill the record
LONGEST = 2000  # characters of a message
EVENT = "library_message"
# a record lies beside published weights, and the directories of the machine that made them are nobody's business
_DIRECTORIES = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/'\"`,;:()<>\[\]{}]+/)+")

Write = Callable[..., None]


class Messages:
    """The messages since a collection began.

    Attributes:
        found: module, level and text of each, in order; every one once.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], None] = {}
        self._write: Write | None = None
        self._lock = threading.Lock()

    def add(self, module: str, level: str, text: str) -> None:
        """Keep a message, unless it is there."""
        key = (module, level, _DIRECTORIES.sub(".../", text.strip())[:LONGEST])
        with self._lock:
            if not key[2] or key in self.found or len(self.found) >= MOST:
                return
            self.found[key] = None
            if self._write is not None:
                _write_one(self._write, key)

    @contextmanager
    def written(self, write: Write) -> Iterator[None]:
        """Write what was and will be collected as events, by ``write(event, **fields)``, until the context ends."""
        with self._lock:
            for key in self.found:
                _write_one(write, key)
            self._write = write
        try:
            yield
        finally:
            with self._lock:
                self._write = None


def _write_one(write: Write, key: tuple[str, str, str]) -> None:
    module, level, text = key
    write(EVENT, module=module, level=level, text=text)


_active: Messages | None = None


@contextmanager
def collected() -> Iterator[Messages]:
    """Collect what libraries say, until the context ends; within another collection that one goes on."""
    global _active
    if _active is not None:
        _hear_loguru(_active)
        yield _active
        return
    messages = Messages()
    logger_class: Any = logging.Logger
    call_handlers, show = logger_class.callHandlers, warnings.showwarning

    def keep_record(_logger: logging.Logger, record: logging.LogRecord) -> None:
        # loggers get handlers of their own when their library is imported, later than this
        if record.levelno >= logging.INFO:
            messages.add(record.name, record.levelname.lower(), _text_of(record))

    def keep_warning(message: Any, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        messages.add(_module_of(filename), category.__name__, str(message))

    _active = messages
    logger_class.callHandlers = keep_record
    warnings.showwarning = keep_warning
    _hear_loguru(messages)
    try:
        yield messages
    finally:
        _active = None
        logger_class.callHandlers = call_handlers
        warnings.showwarning = show
        _leave_loguru()


@contextmanager
def written(write: Write) -> Iterator[None]:
    """Write what the collection that goes on holds and will hold as events; see `Messages.written`."""
    with collected() as messages, messages.written(write):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries print about their own progress is collected, too: it is not this program's output."""
    out = io.StringIO()
    with collected() as messages:
        try:
            with contextlib.redirect_stdout(out):
                yield
        finally:
            for line in out.getvalue().splitlines():
                messages.add("stdout", "printed", line)


def _text_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # a library's mistake in its own message
        return str(record.msg)


def _module_of(filename: str) -> str:
    """The module that a file is, without the place where it is installed."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == filename:
            return name
    return re.sub(r"\.py$", "", filename.rpartition("/")[2])


# --- loguru, which has no handlers of logging's --------------------------------------------------------

_sink: int | None = None


def _hear_loguru(messages: Messages) -> None:
    """Where loguru is imported by now, and writes to standard error as it does by default: here instead."""
    global _sink
    loguru = sys.modules.get("loguru")
    if loguru is None or _sink is not None or not hasattr(loguru, "logger"):
        return
    try:
        loguru.logger.remove(0)
    except ValueError:  # somebody set it up on purpose
        return

    def keep(line: Any) -> None:
        messages.add(str(line.record["name"]), line.record["level"].name.lower(), line.record["message"])

    _sink = loguru.logger.add(keep, level="INFO")


def _leave_loguru() -> None:
    global _sink
    if _sink is not None:
        logger = sys.modules["loguru"].logger
        logger.remove(_sink)
        logger.add(sys.stderr)
        _sink = None
