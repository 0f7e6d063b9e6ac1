"""What a config.json says of the language model, wherever a family keeps it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

TIE = "tie_word_embeddings"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model; the whole, where there is no such part."""
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, dict):
            return part
    thinker = config.get("thinker_config")
    return text_config(thinker) if isinstance(thinker, dict) else config


def head_ties(config: Mapping[str, Any]) -> Literal["no", "model", "part"]:
    """What a config says of a head that is the embedding.

    The word that counts is that of the class that has both (transformers 5 and vLLM read the top level; a thinker has
    its own). ``no``: it is denied somewhere, or said nowhere on the way to the language model; what a vision tower's
    config says is no word about the head. ``model``: that class says so. ``part``: the language model's part says so
    alone, which some classes take up and others do not.
    """
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    if not all(part[TIE] for part in parts if TIE in part):
        return "no"
    way = _way(config)
    if any(part.get(TIE) for part in way[:-1] or way):
        return "model"
    return "part" if way[-1].get(TIE) else "no"


def _way(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a config from the whole to the language model's own."""
    thinker = config.get("thinker_config")
    middle = [thinker] if isinstance(thinker, dict) else []
    text = text_config(config)
    return [config, *middle, *([text] if all(text is not part for part in (config, *middle)) else [])]


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose head is its own, wherever on the way to the language model it says otherwise."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    for part in _way(made):
        if part.get(TIE):
            part[TIE] = False  # type: ignore[index]
    made[TIE] = False
    return made


def untied_text(text: str) -> str:
    """`untied` for a config.json, of which every other byte stays: true becomes false in its place.

    Where only a part says it, the key is put before the last brace, too.
    """
    wanted = untied(json.loads(text))
    for found in reversed(list(re.finditer(rf'"{TIE}"\s*:\s*true', text))):
        changed = text[: found.end() - len("true")] + "false" + text[found.end() :]
        if _ties_less(json.loads(text), json.loads(changed)):
            text = changed
    if TIE not in json.loads(text):
        head = text.rstrip()
        text = f'{head[:-1].rstrip()},\n  "{TIE}": false\n}}{text[len(head) :]}'
    if json.loads(text) != wanted:  # written in a way that a search does not find
        return json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
    return text


def _ties_less(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether the parts that `untied` changes say less often that the head is tied."""
    ways = _way(before), _way(after)
    ties = [sum(bool(part.get(TIE)) for part in way) for way in ways]
    return ties[1] < ties[0]
