"""What to write instead: the end of the sentences about a recipe's mistakes."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline.recipe.sections import Section

Path = tuple[str | int, ...]


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key of this annotation holds; None where it holds a value."""
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


def field_at(model: type[Section], path: Path) -> FieldInfo | None:
    """What is known of the key at `path`; None where there is no such key."""
    found: FieldInfo | None = None
    inside: type[Section] | None = model
    for part in path:
        if inside is None or (found := inside.model_fields.get(str(part))) is None:
            return None
        inside = section_of(found.annotation)
    return found


def holds_text(model: type[Section], path: Path) -> bool:
    """Whether the key at `path` holds free text, as paths and names are; where a list may stand as well, it is YAML."""
    field = field_at(model, path)
    kind = field.annotation if field is not None else None
    return kind is str or (get_origin(kind) in (Union, UnionType) and str in get_args(kind))


def written(path: Path, value: Any, on_command_line: bool) -> str:
    """A key with its value, as one writes it in a recipe or on the command line."""
    if on_command_line:
        keys = list(path)
        while isinstance(value, dict) and len(value) == 1:
            ((key, value),) = value.items()
            keys.append(key)
        text = f"{'.'.join(map(str, keys))}={_flow(value)}"
        return f'"{text}"' if "'" in text and not set('"$`\\!') & set(text) else shlex.quote(text)
    return _flow(value) if isinstance(path[-1], int) else f"{path[-1]}: {_flow(value)}"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def instead(kind: str, model: type[Section], path: Path, given: Any, on_command_line: bool) -> str | None:
    """What fits where `given` stands, after pydantic's error `kind`; None where nothing can be guessed.

    Args:
        kind: pydantic's type of the error.
        model: the recipe's class.
        path: of the key.
        given: its value, as YAML gives it.
        on_command_line: where it was written.
    """
    field = field_at(model, path)
    section = section_of(field.annotation) if field is not None else None
    if kind in ("model_type", "model_attributes_type", "dict_type") and section is not None:
        return _section_instead(section, path, given, on_command_line)
    fitting = list(_alternatives(kind, given))
    if fitting:
        return f"write {written(path, fitting[0], on_command_line)}"
    if given is None and kind.endswith("_type"):
        return None if on_command_line else "nothing stands after the colon"
    if kind == "string_type":
        return _text_instead(given)
    if kind == "dict_type" and field is not None and field.examples:
        return f"for example {written(path, field.examples[0], on_command_line)}"
    return None


def _section_instead(section: type[Section], path: Path, given: Any, on_command_line: bool) -> str:
    if given is None:
        return "nothing stands below it: indent its keys, or leave it out"
    if isinstance(given, str) and (meant := glued(given, list(section.model_fields))):
        return f"a space belongs after the colon: write {meant}"
    keys = [key for key in section.model_fields if not isinstance(given, list | dict) and _takes(section, key, given)]
    if keys:
        return f"write {written(path, {keys[0]: given}, on_command_line)}"
    return f"it is a section, with the keys {', '.join(section.model_fields)}"


def _takes(section: type[Section], key: str, value: Any) -> bool:
    """Whether a key of a section takes a value."""
    try:
        section.model_validate({key: value})
    except ValidationError as error:
        return not any(detail["loc"][:1] == (key,) for detail in error.errors())
    return True


def _alternatives(kind: str, given: Any) -> Iterator[Any]:
    """Values of the right type that `given` was probably meant as."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    plain = given.replace(",", "").replace("_", "").strip() if isinstance(given, str) else ""
    match kind:
        case "list_type" if isinstance(given, str):
            parts = [part.strip() for part in given.split(",")] if not given.startswith("re:") else [given]
            yield [part for part in parts if part]
        case "list_type" if given is None:
            yield []
        case "string_type" if number:
            yield f"{given:.15g}" if isinstance(given, float) else str(given)
        case "int_type" | "int_from_float" if isinstance(given, float) and given.is_integer():
            yield int(given)
        case "int_type" if re.fullmatch(r"[-+]?\d{1,18}", plain):
            yield int(plain)
        case "float_type" if re.fullmatch(r"\d{1,3}(\.\d+)?%", plain):
            yield float(plain[:-1]) / 100
        case "float_type" if re.fullmatch(r"[-+]?\d{1,18}(\.\d+)?", plain):
            yield float(plain)
        case "bool_type" if plain.lower() in ("true", "yes", "on", "1") or given in (1, 1.0):
            yield True
        case "bool_type" if plain.lower() in ("false", "no", "off", "0") or given in (0, 0.0):
            yield False
        case "less_than" | "less_than_equal" if number and 1 <= given <= 100:
            yield given / 100


def _text_instead(given: Any) -> str:
    if isinstance(given, bool):
        return "a word that YAML reads as true or false needs quotes"
    return "a text that begins with { or [, or holds a colon and a space, needs quotes"


def elsewhere(model: type[Section], path: Path) -> str | None:
    """The key of this name that stands in a section, or beside them; None where there is none, or several."""
    last = str(path[-1])
    found = [last] if len(path) > 1 and last in model.model_fields else []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and last in section.model_fields and path[:-1] != (name,):
            found.append(f"{name}.{last}")
    return found[0] if len(found) == 1 else None


def glued(key: str, fields: list[str]) -> str | None:
    """``samples:20`` is one word to YAML; what it was meant as, or None."""
    name, colon, value = key.partition(":")
    if not colon or not value or not difflib.get_close_matches(name.strip(), fields, n=1, cutoff=0.8):
        return None
    return f"{name.strip()}: {value.strip()}"
