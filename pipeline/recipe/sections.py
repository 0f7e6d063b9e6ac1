"""The sections of a recipe: every key, its type, default and meaning. docs/recipe.md is generated from this file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
)

from pipeline.recipe.paths import expanded
from pipeline.units import parse_size, with_unit
from pipeline.vllm_env.serve_arguments import argument_name, kept_argument, name_problem, value_problem

MAX_TOKENS = 1 << 40  # of a context; no model comes near it, and no arithmetic fails at it


# Keys that hold paths, by section: environment variables in them are expanded.
PATHS = (
    ("", "output"),
    ("model", "source"),
    ("calibration", "captions"),
    ("runtime", "work_directory"),
    ("runtime", "vllm_python"),
)


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are mistakes, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _sized(value: Any) -> Any:
    """A size as it was written; raises ValueError where it has no unit."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"a size needs its unit: write {with_unit(value)}")
    if isinstance(value, str):
        parse_size(value)
    return value


def _expanded(value: str | None) -> str | None:
    return expanded(value) if value is not None else None


class Model(Section):
    """The checkpoint to convert."""

    source: str = Field(
        min_length=1,
        description="A hub id (org/name) or a directory with safetensors shards.",
        examples=["Qwen/Qwen3-VL-8B-Instruct"],
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a hub id; null: its main branch.", examples=["main"]
    )

    _source = field_validator("source")(_expanded)


class Calibration(Section):
    """The text that amax is collected on."""

    captions: str = Field(
        "coco2017",
        description="coco2017; embedded (a few hundred, for trying out); a path to .json (COCO annotations), .jsonl or "
        ".txt, or to a directory (built by calib_data, or for the datasets library); or a hub id (org/name).",
        examples=["annotations/captions_train2017.json"],
    )
    samples: int = Field(4096, ge=1, description="How many captions are used, chosen by a seeded rank.", examples=[512])
    per_image: int | None = Field(
        1, ge=1, description="At most so many captions of one image; null: no limit.", examples=[2]
    )
    max_length: int = Field(512, ge=1, description="Tokens; longer captions are cut.", examples=[128])
    batch_tokens: int = Field(
        4096, ge=1, description="Tokens computed at once; fewer take less memory, and more time.", examples=[1024]
    )
    template: Literal["raw", "chat"] = Field(
        "raw",
        description="raw: the caption's tokens alone; chat: the caption as the answer in the model's chat template. "
        "Special tokens written in a caption are text in both.",
        examples=["chat"],
    )
    seed: int = Field(0, ge=0, description="Chooses other captions where there are more than samples.", examples=[1])

    _captions = field_validator("captions")(_expanded)

    @model_serializer(mode="wrap")
    def _keep_null(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A null limit is no default: `recipe_yaml` leaves nulls out, and would read back another recipe."""
        made: dict[str, Any] = write(self)
        return made if self.per_image is not None else {**made, "per_image": None}


class Quality(Section):
    """Gates on the result; a run that misses one is not published. Not built yet: a recipe that sets one is refused."""

    max_kl: float | None = Field(
        None, gt=0, description="Upper bound of the mean KL divergence from the source, in nats.", examples=[0.05]
    )
    max_perplexity_ratio: float | None = Field(
        None, gt=0, description="Upper bound of the perplexity over the source's.", examples=[1.02]
    )
    min_top1: float | None = Field(
        None, gt=0, le=1, description="Lower bound of the share of equal top-1 tokens.", examples=[0.95]
    )


class RopeScaling(Section):
    """YaRN, for contexts longer than the model was trained on."""

    factor: float = Field(gt=1, le=1000, description="By how much the context grows.", examples=[4])
    original_max_position_embeddings: int = Field(
        ge=1, le=MAX_TOKENS, description="Positions that the model was trained on.", examples=[32768]
    )

    @field_validator("factor", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class PromptLimits(Section):
    """How many of each a request may hold; 0 refuses them."""

    image: int | None = Field(None, ge=0, description="Images per request.", examples=[4])
    video: int | None = Field(None, ge=0, description="Videos per request.", examples=[0])
    audio: int | None = Field(None, ge=0, description="Audio clips per request.", examples=[0])


class Serve(Section):
    """What quantize/serve.yaml says to ``vllm serve``; what is left out follows from the checkpoint."""

    gpu_memory: str | None = Field(
        None, description="Memory of one GPU: what cannot fit is refused; null: no check.", examples=["80GB"]
    )
    gpu_memory_utilization: float = Field(
        0.92, gt=0, lt=1, description="The share of a GPU that this server may take.", examples=[0.6]
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model.", examples=[2])
    max_model_len: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="Tokens of a request; null: the model's limit, 32768 at most; with rope_scaling the whole scaled "
        "length.",
        examples=[65536],
    )
    max_num_seqs: int | None = Field(None, ge=1, description="Requests at once; null: vLLM's own.", examples=[64])
    limit_mm_per_prompt: PromptLimits | None = Field(
        None, description="Media per request, for models that see or hear; null: four images and no video."
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "bfloat16"] | None = Field(
        None, description="Of vLLM's cache; null: fp8 where the checkpoint holds KV scales.", examples=["auto"]
    )
    rope_scaling: RopeScaling | None = Field(None, description="YaRN, for contexts beyond the model's positions.")
    served_model_name: str | None = Field(
        None, min_length=1, description="The name in requests; null: the output's name.", examples=["large"]
    )
    extra: dict[str, Any] = Field(
        {},
        description="Other arguments of vllm serve, by their names without dashes.",
        examples=[{"port": 8001, "enable-prefix-caching": True}],
    )

    _gpu_memory = field_validator("gpu_memory", mode="before")(_sized)

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


class Card(Section):
    """What the model card (README.md) says, where the source's own card does not say it, or says something else."""

    base_model: str | None = Field(
        None,
        description="Hub id of what is quantized; null: the source's, if it is one, else what its card is based on.",
        examples=["Qwen/Qwen3-VL-8B-Instruct"],
    )
    licence: str | None = Field(
        None,
        description="The hub's identifier of the licence; null: that of the source's card.",
        examples=["apache-2.0"],
    )
    language: Annotated[
        list[str] | None,
        WithJsonSchema(
            {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}, {"type": "null"}]}
        ),
    ] = Field(
        None,
        description="Languages by their codes, one or a list; null: those of the source's card.",
        examples=[["en", "de"]],
    )
    repo_id: str | None = Field(
        None,
        description="The hub repository that the result will be uploaded to, for the card's title and serve command.",
        examples=["my-org/Qwen3-VL-8B-Instruct-FP8"],
    )

    @field_validator("base_model", "repo_id")
    @classmethod
    def _is_hub_id(cls, value: str | None) -> str | None:
        if value is None:
            return value
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        if value.count("/") != 1 or value.startswith((".", "/", "~")):
            raise ValueError("it is a hub id: org/name")
        try:
            validate_repo_id(value)
        except HFValidationError as error:
            raise ValueError(f"it is a hub id, org/name: {str(error).split('. ')[0]}") from None
        return value

    @field_validator("repo_id")
    @classmethod
    def _is_another(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value == info.data.get("base_model"):
            raise ValueError("it is card.base_model: the result would replace what it was made from")
        return value

    @field_validator("licence")
    @classmethod
    def _is_identifier(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value):
            meant = re.sub(r"[^a-z0-9.+]+", "-", value.lower()).strip("-")
            raise ValueError(
                f"the hub's identifiers are in lower case, without spaces: {meant or 'apache-2.0'}, or other"
            )
        return value

    @field_validator("language", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        if value is False or (isinstance(value, list) and False in value):
            raise ValueError("YAML reads no as false; Norwegian is 'no', in quotes")
        return [value] if isinstance(value, str) else value

    @field_validator("language")
    @classmethod
    def _are_codes(cls, value: list[str] | None) -> list[str] | None:
        for each in value or []:
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", each):
                raise ValueError(f"{each!r} is no language's code; en, de and zh are, and multilingual")
        return value


class ModelOptOptions(Section):
    """``backend_options`` of ModelOpt."""

    exact: bool = Field(
        False,
        description="ModelOpt's own bits, names and configs instead of those made for serving.",
        examples=[True],
    )
    balance: bool = Field(
        True,
        description="Cross-layer equalization of q/k/v and gate/up by exact powers of two, where a shared scale would "
        "cost precision.",
        examples=[False],
    )


class NoOptions(Section):
    """``backend_options`` of a backend that has none."""


class Runtime(Section):
    """Where and how it runs; nothing here changes a byte of the weights of the data-free path.

    A calibrated run's activations depend on the device, and on a CPU on the number of threads.
    """

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="What layers run on while calibrating; auto: a GPU if there is one.", examples=["cpu"]
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Quantizing threads; null: as many as cores that the process may use, 8 at most.",
        examples=[4],
    )
    hidden_states: Literal["auto", "device", "host", "file"] = Field(
        "auto",
        description="Where the activation cache is kept between two layers: on the GPU, in (pinned) memory, or in a "
        "file; auto: the first that has room.",
        examples=["file"],
    )
    device_memory: str | None = Field(
        None, description="At most so much of the GPU's memory; null: all.", examples=["16GB"]
    )
    work_directory: str | None = Field(
        None, description="Where scratch files go; null: beside the output.", examples=["/nvme/scratch"]
    )
    vllm_python: str | None = Field(
        None,
        description="The Python of vLLM's own environment; null: looked for in PIPELINE_VLLM_PYTHON, beside this "
        "environment, and on the PATH.",
        examples=["/opt/vllm/bin/python"],
    )

    _paths = field_validator("work_directory", "vllm_python")(_expanded)
    _device_memory = field_validator("device_memory", mode="before")(_sized)


class Common(Section):
    """The keys that every backend shares."""

    calibrated_schemes: ClassVar[tuple[str, ...]] = ()  # those of the backend whose weights need data

    model: Model = Field(description="The checkpoint to convert.")
    output: str = Field(
        min_length=1,
        description="The directory that will appear, whole and verified.",
        examples=["out/qwen3_vl_8b-fp8-kv_fp8"],
    )
    kv_cache: Literal["fp8", "none"] = Field(
        "fp8",
        description="fp8: calibrated KV scales go into the checkpoint; none: the cache stays BF16.",
        examples=["none"],
    )
    ignore: list[str] = Field(
        [],
        description="Modules that stay BF16, beyond the defaults: names (with all below them), globs, or regular "
        "expressions (re:...). Fused modules are ignored together; a pattern that matches nothing is an error.",
        examples=[["model.layers.0", "*.down_proj", "re:.*layers\\.3[0-5]\\..*"]],
    )
    calibration: Calibration | None = Field(
        None, description="The text that amax is collected on; needed by static activations and by KV scales."
    )
    shard_size: str = Field("5GB", description="Upper bound of an output shard.", examples=["500MB"])
    verify: Literal["structure", "load", "generate"] = Field(
        "load",
        description="How far the result is validated before it is published: its files; vLLM's own loader; vLLM's "
        "engine against the source's answers.",
        examples=["generate"],
    )
    quality: Quality = Field(Quality(), description="Gates on how close the result is to its source.")
    serve: Serve = Field(Serve(), description="What the serve config should say.")
    card: Card = Field(Card(), description="What the model card says that the source's does not.")
    runtime: Runtime = Field(Runtime(), description="Where and how it runs.")

    _shard_size = field_validator("shard_size", mode="before")(_sized)

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
        value = expanded(value)
        if Path(value).name in ("", ".."):
            raise ValueError("it must name a new directory")
        return value

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return parse_size(self.shard_size)
