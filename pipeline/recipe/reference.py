"""docs/recipe.md: every key of a recipe, from the schema itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pipeline.recipe.recipe import json_schema
from pipeline.recipe.sections import Common

HEAD = """\
# The recipe

Generated from `pipeline/recipe/sections.py` by `scripts/generate.sh`; a test holds it current.

A recipe is a YAML file. What the user wants (model, scheme, calibration, gates, serving) stands apart from where and
how it runs (`runtime`). Unknown keys, values out of range and keys that contradict each other are reported all at once,
each with `file:line:column`, before anything heavy is imported. On the command line `KEY=VALUE` with a dotted key wins
over the file: `quantize my.yaml calibration.samples=64`. Text, such as `output`, is taken there as the shell hands it
over (`output='/data/run #3'`); other values are read as YAML. `quantize schema` prints the same as a JSON Schema, for
editors.

Relative paths are taken from the working directory, not from the recipe's. In `model.source`, `output`,
`calibration.captions`, `runtime.work_directory` and `runtime.vllm_python`, `~` is the home directory, and environment
variables are expanded: `$SCRATCH/out`, `${SCRATCH}/out`. One that is unset is an error; `$$` is a dollar sign. Sizes
have a unit: `5GB`, `512MiB`.
"""


def markdown() -> str:
    """The page: a table per section, with type, default, example and meaning of every key."""
    schema = json_schema()
    shared = Common.model_json_schema()
    definitions = {**schema["$defs"], **shared["$defs"]}
    variants = {
        name: definitions[reference.rpartition("/")[2]]
        for name, reference in schema["discriminator"]["mapping"].items()
    }
    parts = [HEAD, "## Top level\n", _backends(variants, definitions), *_table(shared, definitions, "")]
    for name, variant in variants.items():
        options = _section(variant["properties"]["backend_options"], definitions)
        if options is not None and options["properties"]:
            parts += [f"## `backend_options` of {name}\n", *_table(options, definitions, "backend_options.")]
    for name, described in shared["properties"].items():
        section = _section(described, definitions)
        if section is not None:
            parts += [f"## `{name}`\n", section["description"].split("\n")[0] + "\n"]
            parts += _table(section, definitions, f"{name}.")
    return "\n".join(parts)


def _backends(variants: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    rows = ["| `backend` | `scheme` | |", "|---|---|---|"]
    for name, variant in variants.items():
        schemes = ", ".join(f"`{scheme}`" for scheme in _choices(variant["properties"]["scheme"]))
        rows.append(f"| `{name}` | {schemes} | {variant['description'].split(chr(10))[0]} |")
    return "\n".join(rows) + "\n"


def _table(section: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[str]:
    rows = ["| key | type | default | example | |", "|---|---|---|---|---|"]
    inner: list[tuple[str, Mapping[str, Any]]] = []
    for name, described in section["properties"].items():
        below = _section(described, definitions)
        if below is not None:
            inner.append((f"{prefix}{name}.", below))
            example = "a section"
        else:
            example = f"`{_yaml(described['examples'][0])}`"
        required = name in section.get("required", ())
        default = "needed" if required else "" if below is not None else f"`{_yaml(described.get('default'))}`"
        meaning = described.get("description") or (below or {})["description"].split("\n")[0]
        rows.append(f"| `{prefix}{name}` | {_type(described, definitions)} | {default} | {example} | {meaning} |")
    yield "\n".join(rows) + "\n"
    for below_prefix, below in inner:
        if prefix:  # sections of the top level have a heading of their own
            yield from _table(below, definitions, below_prefix)


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, sort_keys=False)
    return text.strip().removesuffix("...").strip().replace("|", "\\|")


def _section(described: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a key holds; None for a plain value."""
    for part in (described, *described.get("anyOf", ()), *described.get("allOf", ())):
        if "$ref" in part:
            found: Mapping[str, Any] = definitions[part["$ref"].rpartition("/")[2]]
            return found
    return None


def _choices(described: Mapping[str, Any]) -> list[str]:
    for part in (described, *described.get("anyOf", ())):
        if "enum" in part:
            return list(part["enum"])
        if "const" in part:
            return [part["const"]]
    return []


def _type(described: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if _section(described, definitions) is not None:
        return "section"
    if choices := _choices(described):
        return ", ".join(f"`{choice}`" for choice in choices)
    words = {"string": "text", "integer": "number", "number": "number", "boolean": "`true`, `false`"}
    words |= {"array": "list", "object": "mapping"}
    kinds = [part.get("type") for part in (described, *described.get("anyOf", ())) if part.get("type") != "null"]
    return " or ".join(words[kind] for kind in kinds if kind)


if __name__ == "__main__":
    print(markdown(), end="")
