"""What other libraries say: in the run's record, each once, and not on the terminal."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import library_messages
from pipeline.events import read_events
from tests.conftest import CALIBRATED, QUANTIZE


class OnStandardError(logging.Handler):
    """As a StreamHandler, of whatever standard error is when something is said."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


@pytest.fixture
def library() -> Any:
    """A library's logger, with a handler of its own on standard error, as transformers and torch have them."""
    logger = logging.getLogger("a_library.of_somebody")
    handler = OnStandardError()
    logger.addHandler(handler)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)


def test_log_lines_warnings_and_prints_are_kept_and_not_shown(library: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with library_messages.collected() as messages:
        library.warning("unrecognized keys: %s", {"axial"})
        logging.getLogger("another").error("on the last resort's handler")
        library.debug("too much")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("this goes away in 9.0", FutureWarning, stacklevel=1)
        with library_messages.quiet():
            print("Inserted 12 quantizers")
            library.warning("within")
        print("the program's own")
    captured = capfd.readouterr()
    assert captured.out == "the program's own\n" and captured.err == ""
    assert list(messages.found) == [
        ("a_library.of_somebody", "warning", "unrecognized keys: {'axial'}"),
        ("another", "error", "on the last resort's handler"),
        (__name__, "FutureWarning", "this goes away in 9.0"),
        ("a_library.of_somebody", "warning", "within"),
        ("stdout", "printed", "Inserted 12 quantizers"),
    ]


def test_afterwards_all_is_as_it_was(library: Any, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.Logger.callHandlers, warnings.showwarning
    with pytest.raises(ZeroDivisionError), library_messages.collected():
        _ = 1 / 0
    with library_messages.quiet():
        library.warning("dropped: nobody keeps a record")
    assert (logging.Logger.callHandlers, warnings.showwarning) == before
    library.warning("heard again")
    assert capfd.readouterr().err == "heard again\n"


def test_loguru_is_heard_and_left_as_it_was() -> None:
    """In a process of its own: loguru keeps the standard error of its import."""
    code = (
        "from pipeline import library_messages as m\n"
        "with m.collected() as messages:\n"
        "    from loguru import logger\n"
        "    with m.quiet(): logger.warning('odd scheme')\n"
        "    logger.info('later')\n"
        "print([(level, text) for _, level, text in messages.found])\n"
        "logger.warning('afterwards')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[('warning', 'odd scheme'), ('info', 'later')]\n"
    assert "afterwards" in done.stderr and "odd scheme" not in done.stderr and "later" not in done.stderr


def test_a_record_has_each_once_from_before_and_after_it_was_opened(library: Any) -> None:
    written: list[dict[str, Any]] = []

    def write(event: str, **fields: Any) -> None:
        written.append({"event": event, **fields})

    with library_messages.collected():
        library.warning("early")
        with library_messages.written(write):
            library.warning("early")
            library.warning("late")
            library.warning("late")
        library.warning("after the record was closed")
    assert [entry["text"] for entry in written] == ["early", "late"]
    assert {entry["event"] for entry in written} == {"library_message"}
    with library_messages.collected() as messages:
        for number in range(2 * library_messages.MOST):
            library.warning("number %d", number)
    assert len(messages.found) == library_messages.MOST


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("cannot read /home/ann/models/x/config.json, sorry", "cannot read .../config.json, sorry"),
        ("in '/opt/venv/lib/y.py': ~/data/z is old", "in '.../y.py': .../z is old"),
        ("see https://hf.co/docs/a/b and model.layers/x", "see https://hf.co/docs/a/b and model.layers/x"),
        ("16/32 done, and/or not", "16/32 done, and/or not"),
    ],
)  # fmt: skip
def test_no_directory_of_this_machine_is_kept(said: str, kept: str) -> None:
    messages = library_messages.Messages()
    messages.add("m", "warning", said)
    assert list(messages.found) == [("m", "warning", kept)]


def test_a_calibrated_run_keeps_transformers_words_in_its_record(
    tmp_path: Path, small_model: Callable[[str], Path], captions: Path, warm: Any
) -> None:
    source = Path(shutil.copytree(small_model("llama"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "axial": 1}
    (source / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "recipe.yaml"
    values = {"backend": "modelopt", "scheme": "fp8", "captions": captions, "samples": 4}
    recipe.write_text(CALIBRATED.format(source=source, output=tmp_path / "out", **values))
    done = warm(recipe, "runtime.device=cpu")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "axial" not in done.stdout
    events = read_events(tmp_path / "out/quantize/events.jsonl")
    said = [event for event in events if event["event"] == "library_message"]
    assert [event["level"] for event in said if "axial" in event["text"]] == ["warning"], said
    assert all(set(event) == {"time", "event", "module", "level", "text"} for event in said)
    assert str(tmp_path) not in json.dumps(said) and "site-packages" not in json.dumps(said)
    traced = subprocess.run([*QUANTIZE, "trace", str(tmp_path / "out"), "-o", "-"], capture_output=True, text=True)
    assert traced.returncode == 0 and json.loads(traced.stdout)["traceEvents"]
