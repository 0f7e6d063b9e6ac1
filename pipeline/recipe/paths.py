"""Environment variables in the paths of a recipe: ``$SCRATCH/out``, ``${SCRATCH}/out``; ``$$`` is a dollar sign."""

from __future__ import annotations

import os
import re

_DOLLAR = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\}?)", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def expanded(text: str) -> str:
    """A path with its environment variables replaced, as a shell would.

    Raises:
        ValueError: a variable is unset or empty, which would name another place, or is written in another way.
    """

    def value(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name = found["name"] or found["braced"]
        if not _NAME.fullmatch(name) or (found["name"] is None and not found[0].endswith("}")):
            raise ValueError(f"{found[0]}: a variable is written $NAME or ${{NAME}}; a dollar sign itself is $$")
        if not (known := os.environ.get(name)):
            state = "is not set" if known is None else "is empty"
            raise ValueError(f"the environment variable {name} {state}; set it, or write $$ for a dollar sign")
        return known

    return _DOLLAR.sub(value, text)


def escaped(text: str) -> str:
    """A path of which `expanded` makes this very text."""
    return text.replace("$", "$$")
