"""What is published names no place, no process and no user of the machine that made it.

While a run is under way its records say these things, for people and for going on; here they are taken out.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.hub import public_name
from pipeline.checkpoint.result import EVENTS, JOURNAL, places
from pipeline.checkpoint.writer import write_file
from pipeline.plan.plan import Plan

GENERATED = "generated"  # prompts and answers in a report, which are anybody's text and no paths
# an absolute path that is none of the run's own, such as a library's in a warning; neither a URL's nor a closing tag
_PATH = re.compile(r"(?<![\w.:/<~\\-])/(?:[\w.@+~-]+/)*([\w.@+~-]+)/?")


class Redaction:
    """Takes the run's own paths out of texts, and after them whatever else looks like an absolute path.

    Args:
        plan: whose recipe names the places.
    """

    def __init__(self, plan: Plan) -> None:
        recipe, root = plan.recipe, plan.checkpoint.root
        output, partial = places(recipe.output)
        self._source = (plan.checkpoint.label, public_name(plan.checkpoint))
        names: dict[str, str] = {str(Path.home()): "~"}
        if recipe.calibration is not None:
            names |= _spellings(recipe.calibration.captions)
        for place in (recipe.runtime.work_directory, recipe.runtime.vllm_python):
            names |= _spellings(place) if place is not None else {}
        for target in (output, partial):
            names |= _spellings(str(target), output.name)
        names |= _spellings(str(root), self._source[1])
        known = sorted((name for name in names if len(Path(name).parts) > 1), key=len, reverse=True)
        host = socket.gethostname()
        words = [rf"(?<![\w./-]){re.escape(name)}(?![\w-])" for name in known]
        if not re.fullmatch(r"[A-Za-z]*|.{,3}", host):  # a plain word may well mean something else
            names[host] = "this machine"
            words.append(rf"(?<![\w./-]){re.escape(host)}(?![\w./-])")
        self._names, self._known = names, re.compile("|".join(words)) if words else None

    def text(self, text: str) -> str:
        """A text without places; what follows a known one stays: ``OUTPUT/config.json``."""
        if text == self._source[0]:
            return self._source[1]
        if self._known is not None:
            text = self._known.sub(lambda found: self._names[found[0]], text)
        return _PATH.sub(lambda found: found[1], text)

    def value(self, value: Any) -> Any:
        """Plain data without places in its texts; what a model was asked and answered stays."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(key): inner if key == GENERATED else self.value(inner) for key, inner in value.items()}
        return [self.value(inner) for inner in value] if isinstance(value, list | tuple) else value

    def records(self, directory: Path) -> None:
        """Rewrite events and journal of a finished run, each at once.

        The journal's first line, the run's identity, is compared with that of later runs and stays as it is. A line
        of the events gets no shorter: `batch` may be reading them, by its place in the file.
        """
        _rewrite(directory / EVENTS, self._event)
        _rewrite(directory / JOURNAL, self._unit)

    def _event(self, number: int, line: bytes) -> bytes:
        if b"/" not in line and b'"pid"' not in line and b'"event":"verified"' not in line:
            return line
        try:
            entry = self.value(json.loads(line))
        except ValueError:
            return b" " * len(line)  # a kill tore it
        entry.pop("pid", None)
        return _line(entry).ljust(len(line))

    def _unit(self, number: int, line: bytes) -> bytes:
        return line if number == 0 or b'"hidden"' not in line else _line(self.value(json.loads(line)))


def _spellings(text: str, name: str | None = None) -> dict[str, str]:
    """A path as one may write it, with the name that stands for it."""
    path = Path(text).expanduser()
    name = name or path.name or path.resolve().name
    return {str(each): name for each in (path.absolute(), path.resolve())}


def _rewrite(path: Path, change: Any) -> None:
    before = path.read_bytes()
    after = b"".join(change(number, line) + b"\n" for number, line in enumerate(before.splitlines()))
    if after != before:
        write_file(path, after)


def _line(entry: Any) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode()
