"""What the user wants: the recipe, validated before anything heavy is imported.

`load` returns a `Recipe` or raises one `UsageError` that lists every mistake, each as
``recipe.yaml:LINE:COLUMN: key: what is wrong; what is allowed``. PyYAML composes the document, so
that every key keeps its place; pydantic validates the values.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args

import yaml
from pydantic import (
    Discriminator,
    TypeAdapter,
    ValidationError,
)

from pipeline.errors import UsageError
from pipeline.recipe import advice
from pipeline.recipe.paths import escaped
from pipeline.recipe.sections import PATHS, Common, ModelOptOptions, NoOptions, Quality, Section
from pipeline.recipe.yaml_text import (
    Document,
    Position,
    compose,
    dotted,
    nearest,
    order,
    parse_text,
    parse_value,
    read,
)


class ModelOptRecipe(Common):
    """NVIDIA ModelOpt: static per-tensor FP8 W8A8, calibrated."""

    backend: Literal["modelopt"]
    scheme: Literal["fp8", "none"]
    calibrated_schemes: ClassVar[tuple[str, ...]] = ("fp8",)
    backend_options: ModelOptOptions = ModelOptOptions()


class LLMCompressorRecipe(Common):
    """llm-compressor: FP8_DYNAMIC, weights per channel, activations per token while serving."""

    backend: Literal["llmcompressor"]
    scheme: Literal["fp8_dynamic", "none"]
    backend_options: NoOptions = NoOptions()


Recipe = ModelOptRecipe | LLMCompressorRecipe
_MODELS: dict[str, type[Common]] = {"modelopt": ModelOptRecipe, "llmcompressor": LLMCompressorRecipe}


def register(backend: str, model: type[Common]) -> None:
    """Let recipes name another backend.

    Args:
        backend: its word.
        model: the recipe, with its ``backend``, ``scheme`` and ``backend_options``, and ``calibrated_schemes``.
    """
    _MODELS[backend] = model
    _adapter.cache_clear()


def unregister(backend: str) -> None:
    """Take `register` back."""
    del _MODELS[backend]
    _adapter.cache_clear()


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    known: Any = Union[tuple(_MODELS.values())]  # noqa: UP007
    made: Any = Annotated[known, Discriminator("backend")]
    return TypeAdapter(made)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors; `recipes/recipe.schema.json` is this, written out."""
    schema = _adapter().json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "FP8 quantization recipe",
        **schema,
    }


# --- reading ----------------------------------------------------------------------------------------


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``KEY=VALUE`` with dotted keys, e.g. ``calibration.samples=64``; they win over the file. The value of
            a key that holds text, such as ``output``, is taken as it stands; others are read as YAML.

    Raises:
        UsageError: with one line for every mistake found.
    """
    path = Path(path)
    return parse(read(path), str(path), overrides)


def parse(text: str, file: str = "recipe.yaml", overrides: Sequence[str] = ()) -> Recipe:
    """As `load`, from text; `file` is the name that errors carry."""
    document = compose(text, file)
    for override in overrides:
        _override(document, override)
    problems = list(document.problems)
    recipe: Recipe | None = None
    try:
        recipe = _adapter().validate_python(document.data)
    except ValidationError as error:
        details = _details(error)
        if details[0]["type"].startswith("union_tag"):  # the rest was not looked at: do it without the tag
            rest = {
                key: value
                for key, value in document.data.items()
                if key not in ("backend", "scheme", "backend_options")
            }
            details += _mistakes(Common, rest)
        problems += [_explain(document, file, detail) for detail in details]
    problems += _contradictions(document, file)
    if problems:
        lines = sorted({(order(place), f"{place.text}: {message}") for place, message in problems})
        raise UsageError("\n".join(line for _, line in lines))
    assert recipe is not None
    return recipe


def _mistakes(model: type[Common], data: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        model.model_validate(data)
    except ValidationError as error:
        return _details(error)
    return []


def _details(error: ValidationError) -> list[dict[str, Any]]:
    return [dict(detail) for detail in error.errors(include_url=False)]


def _override(document: Document, override: str) -> None:
    key, equals, value = override.partition("=")
    place = Position(f"{override!r} on the command line", on_command_line=True)
    parts = key.split(".")
    if not equals or not all(parts):
        document.problems.append((place, "an override is KEY=VALUE with a dotted key, e.g. calibration.samples=64"))
        return
    target = document.data
    for depth, part in enumerate(parts[:-1]):
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            document.problems.append((place, f"{'.'.join(parts[: depth + 1])} holds a value, it has no keys below it"))
            return
        target = inner
    text = advice.holds_text(_model(document), tuple(parts))
    target[parts[-1]], wrong = (parse_text if text else parse_value)(value)
    document.problems += [(place, f"{key}: {message}") for message in wrong]
    prefix = tuple(parts)
    for stale in [path for path in document.places if path[: len(prefix)] == prefix]:
        del document.places[stale]
    document.places[prefix] = place


# --- explaining -------------------------------------------------------------------------------------


def _model(document: Document) -> type[Common]:
    return _MODELS.get(str(document.data.get("backend")), Common)


def _explain(document: Document, file: str, detail: dict[str, Any]) -> tuple[Position, str]:
    """One pydantic error as a place and a sentence."""
    kind, context = detail["type"], detail.get("ctx", {})
    path: tuple[str | int, ...] = tuple(detail["loc"])
    if path and path[0] in _MODELS and document.data.get("backend") == path[0]:
        path = path[1:]  # the union's tag, not a key
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        path = ("backend",)
    place, name, given = nearest(document, path, file), dotted(path), detail.get("input")
    allowed = f"; allowed: {', '.join(_MODELS)}"
    match kind:
        case "extra_forbidden":
            return place, f"{name}: unknown key; {_suggest(document, path)}"
        case "missing":
            return place, f"{name}: this key is missing"
        case "union_tag_not_found":
            return place, f"{name}: this key is missing{allowed}"
        case "union_tag_invalid":
            return place, f"{name}: {document.data.get('backend')!r} is not a backend{allowed}"
        case "literal_error":
            choices = context["expected"].replace("'", "").replace(" or ", ", ")
            return place, f"{name}: {given!r} is not one of its values; allowed: {choices}{_elsewhere(path, given)}"
        case "value_error":
            return place, f"{name}: {given!r} does not fit; {context['error']}"
        case "string_too_short":
            return place, f"{name}: this is empty; a text is needed"
    end = advice.instead(kind, _model(document), path, given, place.on_command_line)
    if kind in ("model_type", "model_attributes_type"):
        what = f"{_shown(given)} does not fit; it should be a mapping of keys to values"
    elif kind.startswith(("greater_than", "less_than")):
        what = f"{given!r} is out of range; {_lower(detail['msg'])}"
    else:
        what = f"{_shown(given)} does not fit; {_lower(detail['msg'])}"
    return place, f"{name}: {what}{f'; {end}' if end else ''}"


def _lower(message: str) -> str:
    message = message.removeprefix("Input ").removeprefix("Value error, ")
    return f"it {message}" if message.startswith("should") else message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _elsewhere(path: tuple[str | int, ...], given: Any) -> str:
    if path != ("scheme",):
        return ""
    owners = [tag for tag, model in _MODELS.items() if given in get_args(model.model_fields["scheme"].annotation)]
    return f" ({given} belongs to backend: {owners[0]})" if owners else ""


def _suggest(document: Document, path: tuple[str | int, ...]) -> str:
    fields = sorted(_fields(document, path[:-1]))
    if not fields:
        return f"{document.data.get('backend')} has none; leave it out"
    if glued := advice.glued(str(path[-1]), fields):
        return f"a space belongs after the colon: write {glued}"
    if other := advice.elsewhere(_model(document), path):
        return f"did you mean {other}?"
    close = difflib.get_close_matches(str(path[-1]), fields, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"allowed: {', '.join(fields)}"


def _fields(document: Document, path: tuple[str | int, ...]) -> Iterator[str]:
    model: Any = _MODELS.get(str(document.data.get("backend")), LLMCompressorRecipe)
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        candidates = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)]
        model = candidates[0]
    yield from model.model_fields


def _contradictions(document: Document, file: str) -> list[tuple[Position, str]]:
    """What no single key shows: keys that do not go together. Runs on raw data, beside pydantic's own errors."""
    data, found = document.data, []

    def problem(key: str, message: str) -> None:
        found.append((nearest(document, (key,), file), f"{key}: {message}"))

    fields = _MODELS.get(str(data.get("backend")), Common).model_fields
    scheme, kv_cache = data.get("scheme"), data.get("kv_cache", fields["kv_cache"].default)
    if scheme == "none" and kv_cache == "none":
        problem("scheme", "none with kv_cache: none leaves nothing to do; choose a scheme or kv_cache: fp8")
    needs = [f"scheme: {scheme}"] if _is_calibrated(data.get("backend"), scheme) else []
    needs += ["kv_cache: fp8"] if kv_cache == "fp8" else []
    if needs and data.get("calibration") is None:
        problem("calibration", f"this key is missing; {' and '.join(needs)} need it (or set kv_cache: none)")
    return found


def _is_calibrated(backend: Any, scheme: Any) -> bool:
    """Whether the weights of a scheme need data; of a backend that does not know it, as those that do."""
    own = _MODELS.get(str(backend))
    owns = own is not None and scheme in get_args(own.model_fields["scheme"].annotation)
    return any(scheme in model.calibrated_schemes for model in ([own] if own and owns else _MODELS.values()))


def recipe_yaml(
    recipe: Recipe, published_source: str | None = None, revision: str | None = None, weights_alone: bool = False
) -> str:
    """The recipe with every default filled in, as YAML that this program reads back.

    Args:
        recipe: validated.
        published_source: written as ``model.source`` instead, and what belongs to this machine left out, for a text
            that others read: of paths the last part stays, of ``runtime`` what is no path.
        revision: written as ``model.revision`` then.
        weights_alone: leave out the sections that change no byte of the shards.
    """
    data = recipe.model_dump(mode="json", exclude_none=True)
    for section, key in PATHS:
        holder = data.get(section, {}) if section else data
        if key in holder:
            holder[key] = escaped(holder[key])
    if published_source is not None:
        data["model"] = {
            "source": escaped(published_source),
            **({"revision": revision} if revision is not None else {}),
        }
        data["output"] = escaped(Path(recipe.output).name)
        for key in ("work_directory", "vllm_python"):
            data["runtime"].pop(key, None)
        if recipe.calibration is not None:
            data["calibration"]["captions"] = escaped(without_directory(recipe.calibration.captions))
        data["serve"]["extra"] = _without_directories(data["serve"]["extra"])
    if weights_alone:
        for key in ("verify", "quality", "serve", "card", "runtime"):
            del data[key]
    ordered = {key: data[key] for key in ("model", "output", "backend", "scheme")} | data
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def without_directory(text: str) -> str:
    """The last part of a path; hub ids and words such as coco2017 stay as they are."""
    local = text.startswith(("/", "~", ".")) or Path(text).exists()
    return (Path(text).name or Path(text).resolve().name) if local else text


def _without_directories(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_directories(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_directories(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~/")) else value


def not_yet_built(recipe: Recipe) -> list[str]:
    """The parts of a valid recipe that this version cannot carry out, one sentence each."""
    missing = []
    if recipe.scheme == "none":
        missing.append("scheme: none (KV scales alone) is not built yet; name a BF16 checkpoint and a scheme")
    if recipe.quality != Quality():
        missing.append("quality: gates are not built yet; leave the section out")
    return missing
