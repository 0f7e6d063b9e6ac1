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


@dataclass(frozen=True)
class Position:
    """Where a key was written: a file's line and column from 1, or the command line."""

    text: str

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
                document.problems.append((place, "a key is a word; found a list or a mapping"))
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

    Text that is no YAML stays text.
    """
    document = Document({}, {}, [])
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return "", []
        value = _convert(node, (), document, "value", [1000])
    except yaml.YAMLError:
        return text, []
    except RecursionError:
        return None, ["the value is nested too deeply"]
    return value, [message.removeprefix(": ") for _, message in document.problems]


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
        raise UsageError(f"{place}: this is not YAML: {what}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: this is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{file}: the values are nested too deeply for a {what}") from None
    return document


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
