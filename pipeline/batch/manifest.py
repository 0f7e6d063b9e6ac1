"""What a batch converts: recipe files, directories of them, and manifests, as one list of jobs.

A manifest is a YAML file with ``jobs`` (recipes with overrides), ``matrix`` (every source with every recipe), or both::

    jobs:
      - recipe: recipes/qwen3_vl_8b-fp8-kv_fp8.yaml
        set: {output: /nvme/out/qwen3_vl_8b, calibration.samples: 1024}
    matrix:
      sources: [Qwen/Qwen3-VL-4B-Instruct, /models/mine]
      recipes: [recipes/qwen3_vl_4b-fp8-kv_fp8.yaml, recipes/qwen3_vl_4b-fp8_dynamic.yaml]
      output: /nvme/out/{source}-{recipe}
    set: {verify: load}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipeline.errors import UsageError
from pipeline.recipe.sections import Section
from pipeline.recipe.yaml_text import Document, compose, dotted, nearest, parse_value, read

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Job:
    """A conversion that a batch is asked for.

    Attributes:
        name: unique in the batch, and a valid name for a directory.
        recipe: the recipe's file.
        overrides: ``KEY=VALUE``, those of the command line last.
    """

    name: str
    recipe: Path
    overrides: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The words that run this conversion alone."""
        return ["quantize", str(self.recipe), *self.overrides]


class _Entry(Section):
    recipe: str = Field(min_length=1)
    name: str | None = Field(None, pattern=r"^[\w][\w.+-]*$")
    set: dict[str, Any] = Field({})


class _Matrix(Section):
    sources: list[str] = Field(min_length=1)
    recipes: list[str] = Field(min_length=1)
    output: str = Field(min_length=1)
    set: dict[str, Any] = Field({})


class _Manifest(Section):
    jobs: list[_Entry] = Field([])
    matrix: _Matrix | None = None
    set: dict[str, Any] = Field({})


def collect(arguments: Sequence[str]) -> tuple[str, list[Job]]:
    """The jobs that a command line names, in its order.

    Args:
        arguments: recipes, manifests and directories, and ``KEY=VALUE`` for every job.

    Returns:
        A name for the batch, and its jobs.

    Raises:
        UsageError: something that is named does not exist, or a manifest is wrong. Recipes are not validated here: a
            wrong one costs its own job only.
    """
    overrides = [word for word in arguments if OVERRIDE.match(word) and not Path(word).exists()]
    paths = [Path(word) for word in arguments if word not in overrides]
    if not paths:
        raise UsageError("batch: name recipes, a directory of recipes, or a manifest")
    found = [job for path in paths for job in _jobs_of(path)]
    often = Counter(job.name for job in found)
    seen: Counter[str] = Counter()
    jobs = []
    for job in found:
        name = job.name if often[job.name] == 1 else _after_output(job)
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}~{seen[name]}"
        jobs.append(Job(unique, job.recipe, (*job.overrides, *overrides)))
    if not jobs:
        raise UsageError(f"{paths[0]}: there is no recipe here (*.yaml)")
    named = paths[0].resolve()
    more = f"-and-{len(paths) - 1}-more" if len(paths) > 1 else ""
    return _word(named.name if named.is_dir() else named.stem) + more, jobs


def _after_output(job: Job) -> str:
    """A name for one of several jobs of a recipe: its output's, where its manifest says one."""
    outputs = [word.partition("=")[2] for word in job.overrides if word.startswith("output=")]
    return _word(outputs[-1].rstrip("/").rpartition("/")[2]) if outputs else job.name


def _jobs_of(path: Path) -> Iterator[Job]:
    """The jobs of a recipe, a directory of recipes or a manifest."""
    if path.is_dir():
        for recipe in sorted(path.iterdir()):
            if recipe.suffix in SUFFIXES and not _is_manifest(recipe):
                yield Job(_word(recipe.stem), recipe, ())
    elif _is_manifest(path):
        yield from _expand(path)
    elif path.exists():
        yield Job(_word(path.stem), path, ())
    else:
        raise UsageError(f"{path}: no such recipe, manifest or directory")


def _is_manifest(path: Path) -> bool:
    try:
        data = compose(read(path), str(path)).data
    except UsageError:
        return False  # whatever it is, it is a job that fails with this very message
    return "model" not in data and bool({"jobs", "matrix"} & data.keys())


def _expand(path: Path) -> Iterator[Job]:
    """The jobs of a manifest."""
    document = compose(read(path), str(path), "manifest")
    manifest = _validate(document, str(path))
    common = _overrides(manifest.set)
    for entry in manifest.jobs:
        recipe = _recipe(path, entry.recipe)
        yield Job(entry.name or _word(recipe.stem), recipe, (*common, *_overrides(entry.set)))
    if (matrix := manifest.matrix) is None:
        return
    for source in matrix.sources:
        for name in matrix.recipes:
            recipe = _recipe(path, name)
            last = _word(source.rstrip("/").rpartition("/")[2])
            output = matrix.output.replace("{source}", last).replace("{recipe}", recipe.stem)
            own = {**matrix.set, "model.source": source, "output": output}
            yield Job(f"{last}-{_word(recipe.stem)}", recipe, (*common, *_overrides(own)))


def _validate(document: Document, file: str) -> _Manifest:
    problems = [f"{place.text}: {text}" for place, text in document.problems]
    try:
        manifest = _Manifest.model_validate(document.data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            where = tuple(detail["loc"])
            problems.append(f"{nearest(document, where, file).text}: {dotted(where)}: {_lower(detail['msg'])}")
        manifest = None
    if manifest is not None and manifest.matrix is not None:
        matrix = manifest.matrix
        for key, values in (("source", matrix.sources), ("recipe", matrix.recipes)):
            if len(values) > 1 and "{" + key + "}" not in matrix.output:
                place = nearest(document, ("matrix", "output"), file).text
                problems.append(f"{place}: matrix.output: with several {key}s it must hold {{{key}}}")
    if problems or manifest is None:
        raise UsageError("\n".join(problems))
    return manifest


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _recipe(manifest: Path, name: str) -> Path:
    """A recipe that a manifest names: beside the manifest, or from the working directory."""
    path = Path(name).expanduser()
    beside = manifest.parent / path
    return beside if not path.is_absolute() and beside.exists() else path


def _overrides(values: dict[str, Any], prefix: str = "") -> tuple[str, ...]:
    found: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += _overrides(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) and parse_value(value) == (value, []) else json.dumps(value)
            found.append(f"{prefix}{key}={text}")
    return tuple(found)


def _word(text: str) -> str:
    """A text as a valid name for a directory."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("._") or "job"
