"""What the user wants: the recipe, validated before anything heavy is imported.

`load` returns a `Recipe` or raises one `UsageError` that lists every mistake, each as
``recipe.yaml:LINE:COLUMN: key: what is wrong; what is allowed``. PyYAML composes the document, so
that every key keeps its place; pydantic validates the values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from pipeline.errors import UsageError
from pipeline.recipe.yaml_text import Document, Position, _Loader, compose, dotted, nearest, order, parse_value, read
from pipeline.units import parse_size
from pipeline.vllm_env.serve_arguments import argument_name, kept_argument, name_problem, value_problem

MAX_TOKENS = 1 << 40  # of a context; no model comes near it, and no arithmetic fails at it


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are mistakes, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """The checkpoint to convert."""

    source: str = Field(min_length=1, description="A hub id (org/name) or a directory with safetensors shards.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")


class Calibration(Section):
    """The text that ranges are measured on."""

    captions: str = Field(
        "coco2017",
        description="coco2017; embedded (a few hundred, for trying out); a path to .json (COCO annotations), .jsonl or "
        ".txt, or to a directory (built by calib_data, or for the datasets library); or a hub id (org/name).",
    )
    samples: int = Field(4096, ge=1)
    per_image: int | None = Field(1, ge=1, description="At most so many captions of one image; null: no limit.")
    max_length: int = Field(512, ge=1, description="Tokens; longer captions are cut.")
    batch_tokens: int = Field(4096, ge=1, description="Tokens computed at once; fewer take less memory, and more time.")
    template: Literal["raw", "chat"] = "raw"
    seed: int = Field(0, ge=0)

    @model_serializer(mode="wrap")
    def _keep_null(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A null limit is no default: `recipe_yaml` leaves nulls out, and would read back another recipe."""
        made: dict[str, Any] = write(self)
        return made if self.per_image is not None else {**made, "per_image": None}


class Quality(Section):
    """Gates on the result; a run that misses one is not published."""

    max_kl: float | None = Field(None, gt=0)
    max_perplexity_ratio: float | None = Field(None, gt=0)
    min_top1: float | None = Field(None, gt=0, le=1)


class RopeScaling(Section):
    """YaRN, for contexts longer than the model was trained on."""

    factor: float = Field(gt=1, le=1000)
    original_max_position_embeddings: int = Field(
        ge=1, le=MAX_TOKENS, description="Positions before scaling, e.g. 32768."
    )

    @field_validator("factor", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class PromptLimits(Section):
    """How many of each a request may hold; 0 refuses them."""

    image: int | None = Field(None, ge=0)
    video: int | None = Field(None, ge=0)
    audio: int | None = Field(None, ge=0)


class Serve(Section):
    """What quantize/serve.yaml says to ``vllm serve``; what is left out follows from the checkpoint."""

    gpu_memory: str | None = Field(None, description="Of one GPU, e.g. 80GB: what cannot fit is refused.")
    gpu_memory_utilization: float = Field(0.92, gt=0, lt=1, description="The share that this server may take.")
    tensor_parallel_size: int = Field(1, ge=1)
    max_model_len: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="Tokens; null: the model's limit, 32768 at most; with rope_scaling the whole scaled length.",
    )
    max_num_seqs: int | None = Field(None, ge=1, description="Requests at once; null: vLLM's own.")
    limit_mm_per_prompt: PromptLimits | None = Field(
        None, description="For models that see or hear; null: four images and no video."
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "bfloat16"] | None = Field(
        None, description="null: fp8 where the checkpoint holds KV scales."
    )
    rope_scaling: RopeScaling | None = None
    served_model_name: str | None = Field(None, min_length=1, description="null: the output's name.")
    extra: dict[str, Any] = Field({}, description="Other arguments of vllm serve, by their names without dashes.")

    @field_validator("gpu_memory")
    @classmethod
    def _gpu_memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("gpu_memory_utilization", mode="after")
    @classmethod
    def _leaves_room(cls, value: float) -> float:
        if value > 0.98:
            raise ValueError("a GPU that is filled to the brim fails under load; 0.92 is usual, 0.98 the most")
        return value

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _has_scales(cls, value: Any) -> Any:
        if value == "fp8_e5m2":
            raise ValueError("vLLM refuses that cache for FP8 checkpoints, whose scales are for fp8_e4m3; use fp8")
        return value

    @field_validator("served_model_name")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and (why := name_problem(value)):
            raise ValueError(why)
        return value

    @field_validator("extra")
    @classmethod
    def _others(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, argument in value.items():
            key = argument_name(name)
            if key in made:
                raise ValueError(f"{name}: this argument is here twice")
            if why := kept_argument(key, info.data.get("rope_scaling") is not None):
                raise ValueError(f"{name}: {why}")
            if why := value_problem(argument):
                raise ValueError(f"{name}: {why}")
            made[key] = argument
        return made


class ModelOptOptions(Section):
    """``backend_options`` of ModelOpt."""

    exact: bool = Field(False, description="ModelOpt's own bits, names and configs instead of those made for serving.")
    balance: bool = Field(
        True, description="Balance q/k/v and gate/up by exact powers of two where a shared scale would cost precision."
    )


class NoOptions(Section):
    """``backend_options`` of a backend that has none."""


class Runtime(Section):
    """Where and how it runs; nothing here changes a byte of the weights of the data-free path.

    A calibrated run's activations depend on the device, and on a CPU on the number of threads.
    """

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="What layers run on while calibrating.")
    threads: int | None = Field(
        None, ge=1, le=256, description="Quantizing threads; null: as many as cores, 8 at most."
    )
    hidden_states: Literal["auto", "device", "host", "file"] = Field(
        "auto", description="Where hidden states wait between two layers: the GPU, (pinned) memory, or a file."
    )
    device_memory: str | None = Field(None, description="At most so much of the GPU's memory, e.g. 16GB; null: all.")
    work_directory: str | None = Field(None, description="Where scratch files go; null: beside the output.")
    vllm_python: str | None = Field(None, description="The Python of vLLM's own environment.")

    @field_validator("device_memory")
    @classmethod
    def _device_memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value


class Common(Section):
    """The keys that every backend shares."""

    model: Model
    output: str = Field(min_length=1, description="The directory that will appear, whole and verified.")
    kv_cache: Literal["fp8", "none"] = Field("fp8", description="fp8: calibrated scales go into the checkpoint.")
    ignore: list[str] = Field(
        [],
        description="Modules kept as they are, beyond the defaults: names, globs, or regular expressions (re:...).",
    )
    calibration: Calibration | None = None
    shard_size: str = Field("5GB", description="Upper bound of an output shard, e.g. 5GB or 500MB.")
    verify: Literal["structure", "load", "generate"] = "load"
    quality: Quality = Quality()
    serve: Serve = Field(Serve(), description="What the serving profile should say.")
    runtime: Runtime = Runtime()

    @field_validator("shard_size")
    @classmethod
    def _shard_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @field_validator("ignore")
    @classmethod
    def _ignore(cls, value: list[str]) -> list[str]:
        for pattern in value:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except (re.error, OverflowError, RecursionError) as error:
                    raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value

    @field_validator("output")
    @classmethod
    def _output(cls, value: str) -> str:
        if Path(value).name in ("", ".."):
            raise ValueError("it must name a new directory")
        return value

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return parse_size(self.shard_size)


class ModelOptRecipe(Common):
    """NVIDIA ModelOpt: static per-tensor FP8 W8A8, calibrated."""

    backend: Literal["modelopt"]
    scheme: Literal["fp8", "none"]
    backend_options: ModelOptOptions = ModelOptOptions()


class LLMCompressorRecipe(Common):
    """llm-compressor: FP8_DYNAMIC, weights per channel, activations per token while serving."""

    backend: Literal["llmcompressor"]
    scheme: Literal["fp8_dynamic", "none"]
    backend_options: NoOptions = NoOptions()


Recipe = ModelOptRecipe | LLMCompressorRecipe
_adapter: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Discriminator("backend")])
_MODELS: dict[str, type[Common]] = {"modelopt": ModelOptRecipe, "llmcompressor": LLMCompressorRecipe}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors; `recipes/recipe.schema.json` is this, written out."""
    schema = _adapter.json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "FP8 quantization recipe",
        **schema,
    }


# --- places -----------------------------------------------------------------------------------------


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


# --- reading ----------------------------------------------------------------------------------------


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``KEY=VALUE`` with dotted keys, e.g. ``calibration.samples=64``; they win over the file.

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
        recipe = _adapter.validate_python(document.data)
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
    place = Position(f"{override!r} on the command line")
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
    target[parts[-1]], wrong = parse_value(value)
    document.problems += [(place, f"{key}: {message}") for message in wrong]
    prefix = tuple(parts)
    for stale in [path for path in document.places if path[: len(prefix)] == prefix]:
        del document.places[stale]
    document.places[prefix] = place


# --- explaining -------------------------------------------------------------------------------------


def _explain(document: Document, file: str, detail: dict[str, Any]) -> tuple[Position, str]:
    """One pydantic error as a place and a sentence."""
    kind, context = detail["type"], detail.get("ctx", {})
    path: tuple[str | int, ...] = tuple(detail["loc"])
    if path and path[0] in _MODELS and document.data.get("backend") == path[0]:
        path = path[1:]  # the union's tag, not a key
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        path = ("backend",)
    place, name, given = nearest(document, path, file), dotted(path), detail.get("input")
    allowed = "; allowed: modelopt, llmcompressor"
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
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return place, f"{name}: {given!r} is out of range; {_lower(detail['msg'])}"
        case "string_too_short":
            return place, f"{name}: this is empty; a text is needed"
        case _:
            return place, f"{name}: {_shown(given)} does not fit; {_lower(detail['msg'])}"


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

    scheme, kv_cache = data.get("scheme"), data.get("kv_cache", "fp8")
    if scheme == "none" and kv_cache == "none":
        problem("scheme", "none with kv_cache: none leaves nothing to do; choose a scheme or kv_cache: fp8")
    needs = [f"{key}: {value}" for key, value in (("scheme", scheme), ("kv_cache", kv_cache)) if value == "fp8"]
    if needs and data.get("calibration") is None:
        problem("calibration", f"this key is missing; {' and '.join(needs)} need it (or set kv_cache: none)")
    return found


def recipe_yaml(recipe: Recipe, published_source: str | None = None) -> str:
    """The recipe with every default filled in, as YAML that this program reads back.

    Args:
        recipe: validated.
        published_source: written as ``model.source`` instead, and what belongs to this machine (output, runtime)
            left out: for a text that others read.
    """
    data = recipe.model_dump(mode="json", exclude_none=True)
    if published_source is not None:
        data["model"]["source"] = published_source
        data["output"] = data["output"].rstrip("/").rpartition("/")[2]
        del data["runtime"]
        if "calibration" in data and Path(data["calibration"]["captions"]).exists():
            data["calibration"]["captions"] = Path(data["calibration"]["captions"]).name
    ordered = {key: data[key] for key in ("model", "output", "backend", "scheme")} | data
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def not_yet_built(recipe: Recipe) -> list[str]:
    """The parts of a valid recipe that this version cannot carry out, one sentence each."""
    missing = []
    if recipe.scheme == "none":
        missing.append("scheme: none (KV scales alone) is not built yet; name a BF16 checkpoint and a scheme")
    if recipe.quality != Quality():
        missing.append("quality: gates are not built yet; leave the section out")
    return missing
