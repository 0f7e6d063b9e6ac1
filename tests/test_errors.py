"""Errors keep what is wrong and what to do apart; nothing takes their sentences to pieces."""

from __future__ import annotations

import ast
import errno
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.backends.base import CalibrationError
from pipeline.backends.fp8 import NonFiniteWeight
from pipeline.checkpoint.source import SourceError
from pipeline.errors import OtherRun, PipelineError, from_os_error
from tests.conftest import ROOT

PLAIN = [
    error
    for error in (*vars(errors).values(), CalibrationError, SourceError)
    if isinstance(error, type) and issubclass(error, PipelineError) and error is not OtherRun
]


def sources() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        yield path, path.read_text()


def copies(error: PipelineError) -> Iterator[PipelineError]:
    """The error itself, and what comes out of a process of its own, with every protocol of pickle."""
    yield error
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(error, protocol))


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.__name__)
def test_message_and_remedy(kind: type[PipelineError]) -> None:
    for error in copies(kind("the disk is full; all of it", remedy="free some")):
        assert type(error) is kind
        assert (error.message, error.remedy) == ("the disk is full; all of it", "free some")
        assert str(error) == "the disk is full; all of it; free some"
    for error in copies(kind("one\ntwo")):
        assert (error.message, error.remedy, str(error)) == ("one\ntwo", None, "one\ntwo")


def test_errors_with_arguments_of_their_own() -> None:
    for error in copies(OtherRun("it differs in\n  scheme", frozenset({"scheme"}), begun=True, remedy="use --fresh")):
        assert isinstance(error, OtherRun)
        assert error.fields == {"scheme"} and error.begun and error.remedy == "use --fresh"
        assert str(error) == "it differs in\n  scheme\nuse --fresh"
    for error in copies(NonFiniteWeight(3)):
        assert isinstance(error, NonFiniteWeight)
        assert error.row == 3 and str(error) == "NaN or Inf" and error.remedy is None


def test_a_line_that_is_added_later() -> None:
    made = PipelineError("it failed", remedy="run again")
    made.add_line("  kept: /here")
    for error in copies(made):
        assert (error.message, error.remedy) == ("it failed", "run again")
        assert str(error) == "it failed; run again\n  kept: /here"


def test_every_class_is_tested_and_every_kind_documented() -> None:
    bases = {"PipelineError"}
    found = set()
    for _ in range(3):  # a class of a class of a class
        for _, text in sources():
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef) and bases & {b.id for b in node.bases if isinstance(b, ast.Name)}:
                    found.add(node.name)
        bases |= found
    assert bases == {kind.__name__ for kind in (*PLAIN, OtherRun, NonFiniteWeight)}
    table = re.findall(r"^    ([a-z ]{13}) \S", str(PipelineError.__doc__).split("=\n")[1], re.MULTILINE)
    assert sorted(row.strip() for row in table) == sorted({error.kind for error in PLAIN})


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, "disk", "the disk is full while writing (/x/y); free some space and run the same command again"),
        (errno.EROFS, "failed", "no permission while writing (/x/y): why; choose a directory you may write to"),
        (errno.EIO, "failed", "the device failed while writing (/x/y): why; check the drive, then run again"),
        (errno.ENOMEM, "out of memory", "writing failed (/x/y): why"),
        (errno.ENOENT, "failed", "writing failed (/x/y): why"),
    ],
)
def test_what_the_system_raises(number: int, kind: str, text: str) -> None:
    error = from_os_error(OSError(number, "why", "/x/y"), "writing")
    assert (error.kind, str(error)) == (kind, text)
    assert (error.remedy is not None) == ("; " in text)


# Of a library's error a program may have nothing but the text; these read torch's and CUDA's.
LIBRARIES = {"errors.py"}
PARSED = re.compile(
    r"""partition\(["'];\s|split\(["'];\s|(?<!for line )\bin str\(\w*(error|told)\)"""
    r"""|str\(\w*(error|told)\)\.(starts|ends)with"""
)


def test_nothing_parses_our_own_sentences() -> None:
    for path, text in sources():
        found = [line.strip() for line in text.splitlines() if PARSED.search(line)]
        assert not found or path.name in LIBRARIES, (path, found)


def test_a_raised_text_ends_in_no_remedy() -> None:
    """What begins like an instruction behind a semicolon belongs into `remedy`."""
    asks = re.compile(
        r"; (use|set|choose|free|lower|raise|move|fetch|remove|check|make|run|mend|put|leave|unset|save|name|accept|"
        r"please|start|restore|complete|wait|end|install) [^;]*$"
    )
    kinds = {kind.__name__ for kind in (*PLAIN, OtherRun)}
    for path, text in sources():
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds):
                continue
            message = node.args[0] if node.args else None
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            plain = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)
            assert not asks.search(plain), (path, node.lineno, plain)
