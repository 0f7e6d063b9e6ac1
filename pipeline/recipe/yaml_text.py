"""YAML text as plain data, with the position of every key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UsageError

MAX_RECIPE_BYTES = 1 << 20
MAX_RECIPE_NODES = 20_000
BRACKETS = "a text with braces or brackets needs quotes"


@dataclass(frozen=True)
class Position:
    """Where a key was written: a file's line and column from 1, or the command line."""

    text: str
    on_command_line: bool = False

    @classmethod
    def of(cls, file: str, node: yaml.Node) -> Position:
        """Where a YAML node begins."""
        return cls(f"{file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}")


@dataclass
class Document:
    """A YAML document as plain data, the place of every key, and what is wrong with it so far."""

    data: dict[str, Any]
    places: dict[tuple[str | int, ...], Position]
    problems: list[tuple[Position, str]]


def _convert(node: yaml.Node, path: tuple[str | int, ...], document: Document, file: str, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise UsageError(f"{Position.of(file, node).text}: the recipe has more than {MAX_RECIPE_NODES} values")
    document.places.setdefault(path, Position.of(file, node))
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = Position.of(file, key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                document.problems.append((place, "a key is a word; found a list or a mapping; " + BRACKETS))
                continue
            key = key_node.value
            here = (*path, key)
            if key in result:
                first = document.places[here].text
                document.problems.append((place, f"{dotted(here)}: this key is here twice; first at {first}"))
                continue
            document.places[here] = place
            result[key] = _convert(value_node, here, document, file, budget)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, (*path, index), document, file, budget) for index, item in enumerate(node.value)]
    try:
        return _scalar(node)
    except (ValueError, AttributeError, OverflowError, TypeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split("\n")[0].split())
        if node.tag.startswith("!") and not node.tag.startswith("!!"):
            what += "; a text that begins with ! needs quotes"
        document.problems.append((document.places[path], f"{dotted(path)}: this value cannot be read: {what}"))
        return None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without two of its surprises: dates stay text, and 1e-3 is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def parse_value(text: str) -> tuple[Any, list[str]]:
    """The value of a KEY=VALUE override, read as YAML would read it, and what is wrong with it.

    Text that is no YAML stays text, and so does text with a comment: the shell has its own, a value holds none.
    """
    document = Document({}, {}, [])
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return text.strip() and text, []
        if text[node.end_mark.index :].lstrip().startswith("#"):
            return text, []
        value = _convert(node, (), document, "value", [1000])
    except yaml.YAMLError:
        return text, []
    except RecursionError:
        return None, ["the value is nested too deeply"]
    return value, [message.removeprefix(": ") for _, message in document.problems]


def parse_text(text: str) -> tuple[Any, list[str]]:
    """As `parse_value`, for a key that holds text: the value as it stands, but for YAML's quotes around it and null."""
    if text in ("null", "Null", "NULL", "~"):
        return None, []
    value, wrong = parse_value(text) if text[:1] in ("'", '"') else (text, [])
    return (value, wrong) if isinstance(value, str) else (text, [])


def dotted(path: Iterable[str | int]) -> str:
    """A key's path as an override would spell it: ``calibration.samples``, ``ignore[1]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read(path: Path) -> str:
    """The text of a recipe's file, or of a manifest's. Raises UsageError."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UsageError(f"{path}: a recipe is a YAML file; this is a directory or a device")
        if size > MAX_RECIPE_BYTES:
            raise UsageError(
                f"{path}: a recipe is at most {MAX_RECIPE_BYTES:,} bytes, this file has {size:,}",
                remedy="is it the right file?",
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not UTF-8; a recipe is a text file in YAML") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def compose(text: str, file: str, what: str = "recipe") -> Document:
    """A YAML file as plain data and places; raises UsageError where it is none."""
    document = Document({}, {}, [])
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise UsageError(f"{file}:1:1: the {what} is empty", remedy="recipes/ holds examples")
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{Position.of(file, node).text}: a {what} is a mapping of keys to values")
        document.data = _convert(node, (), document, file, [MAX_RECIPE_NODES])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        what = " ".join(str(part) for part in (error.problem, error.context) if part)
        raise UsageError(f"{place}: this is not YAML: {what}", remedy=_hint(error, text.splitlines())) from None
    except yaml.YAMLError as error:
        raise UsageError(
            f"{file}: this is not YAML: {' '.join(str(error).split())}", remedy="save it as plain text in UTF-8"
        ) from None
    except RecursionError:
        raise UsageError(f"{file}: the values are nested too deeply for a {what}") from None
    return document


INDENTED = "keys of one section begin in the same column, with spaces before them"
NEEDS_QUOTES = "a text that {} needs quotes: 'TEXT'"


def _hint(error: yaml.MarkedYAMLError, lines: list[str]) -> str | None:
    """What was probably meant where PyYAML stops; None where its own words have to do."""
    problem, context, mark = str(error.problem), str(error.context), error.problem_mark or error.context_mark
    begun = error.context_mark or mark
    if "'\\t'" in problem:
        return "indent with spaces: YAML takes no tab there"
    if found := re.search(r"character '(.)' that cannot start", problem):
        return NEEDS_QUOTES.format(f"begins with {found[1]}")
    if "alias" in context + problem or "anchor" in context:
        return NEEDS_QUOTES.format("begins with * or &")
    if "quoted scalar" in context:
        return "a quote is not closed" if "end of stream" in problem else "write it in single quotes: 'TEXT'"
    if "block scalar" in context:
        return NEEDS_QUOTES.format("begins with | or >")
    if "flow" in context:
        return "a bracket or brace is not closed, or a text within it needs quotes"
    if "another document" in problem:
        return "it is one document: remove the line ---"
    if mark is None or begun is None:
        return None
    if "expected ':'" in problem:
        return _line_hint(lines, begun.line)
    if "mapping values" in problem:
        if ":" in _line(lines, mark.line)[: mark.column]:
            return NEEDS_QUOTES.format("holds a colon and a space")
        above = next((n for n in range(mark.line - 1, -1, -1) if _line(lines, n).strip()), mark.line)
        return _line_hint(lines, above) or INDENTED
    if "'<scalar>'" in problem:
        return NEEDS_QUOTES.format("holds quotes")
    return INDENTED if problem.startswith("expected <block end>") or "document start" in problem else None


def _line(lines: list[str], number: int) -> str:
    return lines[number] if number < len(lines) else ""


def _line_hint(lines: list[str], number: int) -> str | None:
    """What is wrong with a line that should be ``key: value``; None where it is one."""
    text = _line(lines, number).strip()
    if re.match(r"-[^\s-]", text):
        return f"a space belongs after the dash: - {text[1:]}"
    if found := re.match(r"([\w.-]+):(\S.*)", text):
        return f"a space belongs after the colon: {found[1]}: {found[2]}"
    return None if re.match(r"(- +)?[^:]+:(\s|$)", text) else f"line {number + 1} is not KEY: VALUE"


def order(place: Position) -> tuple[int, int, str]:
    """A key that sorts positions as they stand in the file, those of the command line last."""
    found = re.search(r":(\d+):(\d+)$", place.text)
    return (int(found[1]), int(found[2]), "") if found else (1 << 30, 0, place.text)


def nearest(document: Document, path: tuple[str | int, ...], file: str) -> Position:
    """Where a key stands, or the nearest one above it."""
    for end in range(len(path), -1, -1):
        if path[:end] in document.places:
            return document.places[path[:end]]
    return Position(f"{file}:1:1")
