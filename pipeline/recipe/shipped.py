"""The recipes that come with this program: models and schemes in one table, written out as YAML on demand.

``quantize recipes`` lists and copies them; the files in the repository's ``recipes/`` are the same texts
(scripts/generate.sh writes them, a test holds them equal), so that a wheel needs no data files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import UsageError


@dataclass(frozen=True)
class Model:
    """A model on the hub, with what ``quantize plan`` says of its real shape.

    Attributes:
        key: begins its recipes' names.
        title: as its makers call it.
        source: the hub id.
        sizes: of the source and of the result, as text in GB; None where it was not planned.
        memory: for calibration on 4096 captions, in GB: of a GPU, and of a host without one, with 8 threads; a model
            without has no recipes but those of its profiles.
        data_free: memory without calibration, in GB, with 2 threads and with 8.
        vision: whether it has a vision tower.
        notes: further lines for the recipe's head.
    """

    key: str
    title: str
    source: str
    sizes: tuple[str, str] | None
    memory: tuple[str, str] | None
    data_free: tuple[str, str] = ("0.33", "0.53")
    vision: bool = True
    notes: tuple[str, ...] = ()


_EXPERTS = (
    "Routers and gates stay BF16; experts are written one tensor per expert and share the amax of their layer's input.",
)
_GATED = ("The model is gated: accept its licence on the hub and set HF_TOKEN first.",)
MODELS = (
    Model("qwen2_5_vl_3b", "Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B-Instruct", ("7.51", "4.74"), ("1.2", "3.1")),
    Model("qwen2_5_vl_7b", "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct", ("16.6", "10.1"), ("2.5", "4.9")),
    Model("qwen3_vl_4b", "Qwen3-VL-4B", "Qwen/Qwen3-VL-4B-Instruct", ("8.88", "5.24"), ("1.3", "3.3")),
    Model("qwen3_vl_8b", "Qwen3-VL-8B", "Qwen/Qwen3-VL-8B-Instruct", ("17.5", "10.6"), ("2.2", "4.5")),
    Model("qwen3_vl_32b", "Qwen3-VL-32B", "Qwen/Qwen3-VL-32B-Instruct", ("66.7", "35.5"), ("4.3", "7.5")),
    Model(
        "qwen3_vl_30b_a3b", "Qwen3-VL-30B-A3B", "Qwen/Qwen3-VL-30B-A3B-Instruct", ("62.1", "32.3"), ("3.7", "7.6"),
        ("0.56", "0.86"), notes=_EXPERTS,
    ),
    Model("qwen3_8b", "Qwen3-8B", "Qwen/Qwen3-8B", ("16.4", "9.44"), ("2.2", "4.5"), vision=False),
    Model(
        "llama_3_1_8b", "Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", ("16.1", "9.08"), ("2.4", "4.7"),
        vision=False, notes=_GATED,
    ),
    Model("qwen3_1_7b", "Qwen3-1.7B", "Qwen/Qwen3-1.7B", None, None, vision=False),
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A scheme with or without KV scales: what the recipes of all models share.

    Attributes:
        key: ends its recipes' names.
        summary: after ``MODEL to``.
        keys: of the recipe, in order.
    """

    key: str
    summary: str
    keys: tuple[tuple[str, str], ...]

    @property
    def calibrated(self) -> bool:
        """Whether captions are needed."""
        return dict(self.keys)["kv_cache"] == "fp8"


SCHEMES = (
    Scheme(
        "fp8-kv_fp8",
        "ModelOpt FP8 (static W8A8, per-tensor) with calibrated FP8 KV scales.",
        (("backend", "modelopt"), ("scheme", "fp8"), ("kv_cache", "fp8")),
    ),
    Scheme(
        "fp8_dynamic-kv_fp8",
        "FP8_DYNAMIC with calibrated FP8 KV scales.",
        (("backend", "llmcompressor"), ("scheme", "fp8_dynamic"), ("kv_cache", "fp8")),
    ),
    Scheme(
        "fp8_dynamic",
        "FP8_DYNAMIC: per-channel weights, activations per token while serving; no calibration.",
        (("backend", "llmcompressor"), ("scheme", "fp8_dynamic"), ("kv_cache", "none")),
    ),
)
CALIBRATION = "calibration:\n  captions: coco2017\n  samples: 4096\n"
CAPTIONS = "COCO's captions first: python -m calib_data annotations/captions_*2017.json"


@dataclass(frozen=True)
class Profile:
    """A recipe whose result is served in a stated way.

    Attributes:
        model: its `Model.key`.
        name: what follows the scheme's key in the recipe's name.
        head: lines about it; ``{result}`` stands for the result's name.
        serve: the recipe's section.
        renamed: whether the output has the profile's name, too: other weights would not serve another profile.
    """

    model: str
    name: str
    head: tuple[str, ...]
    serve: str
    renamed: bool = False


_SERVE = "vllm serve {result} --config {result}/quantize/serve.yaml"
PROFILES = (
    Profile(
        "qwen3_vl_32b", "two_48gb",
        ("For two GPUs of 48 GB. Then, on the first two GPUs:", f"  CUDA_VISIBLE_DEVICES=0,1 {_SERVE}"),
        "  gpu_memory: 48GB\n  tensor_parallel_size: 2\n  max_model_len: 65536\n  max_num_seqs: 64\n"
        "  limit_mm_per_prompt: {image: 8, video: 1}\n  served_model_name: large\n",
    ),
    Profile(
        "qwen3_vl_8b", "shared_48gb",
        ("For most of a GPU of 48 GB that it shares with qwen3_1_7b-fp8-kv_fp8-shared_48gb. Start this one first; the",
         "other when it is up, since each looks for its share of what is free:",
         f"  CUDA_VISIBLE_DEVICES=2 {_SERVE}"),
        "  gpu_memory: 48GB\n"
        "  gpu_memory_utilization: 0.6       # 0.6 and 0.3 leave a tenth for what servers take beyond their share\n"
        "  max_model_len: 32768\n  max_num_seqs: 32\n  limit_mm_per_prompt: {image: 4, video: 0}\n"
        "  served_model_name: middle\n",
    ),
    Profile(
        "qwen3_1_7b", "shared_48gb",
        ("For the rest of a GPU of 48 GB, beside qwen3_vl_8b-fp8-kv_fp8-shared_48gb:",
         f"  CUDA_VISIBLE_DEVICES=2 {_SERVE} --port 8001"),
        "  gpu_memory: 48GB\n  gpu_memory_utilization: 0.3\n  max_model_len: 32768\n  max_num_seqs: 64\n"
        "  served_model_name: small\n",
    ),
    Profile(
        "qwen3_8b", "yarn_131k",
        ("Served with YaRN: 32,768 positions become 131,072, as its makers say it can be, on a GPU of 48 GB:",
         f"  {_SERVE}"),
        "  gpu_memory: 48GB\n  max_model_len: 131072\n  max_num_seqs: 16\n"
        "  rope_scaling: {factor: 4, original_max_position_embeddings: 32768}\n",
        renamed=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """One recipe: its name, a line about it, and its parts."""

    name: str
    model: Model
    scheme: Scheme
    profile: Profile | None = None

    @property
    def summary(self) -> str:
        """For a list."""
        more = f" {self.profile.head[0].rstrip(':')}" if self.profile else ""
        return f"{self.model.title} to {self.scheme.summary}{more}"

    def text(self, file: str | None = None) -> str:
        """The recipe as YAML.

        Args:
            file: where it will be; None for the repository's own ``recipes/``, where editors find the schema.
        """
        result = self.name if self.profile is None or self.profile.renamed else f"{self.model.key}-{self.scheme.key}"
        head = [f"{self.model.title} to {self.scheme.summary}", *_about(self.model, self.scheme)]
        if self.profile is not None:
            head += [line.format(result=result) for line in self.profile.head]
        if self.scheme.calibrated:
            head.append(CAPTIONS)
        schema = "# yaml-language-server: $schema=recipe.schema.json\n#\n" if file is None else ""
        launch = f"#   quantize {file or f'recipes/{self.name}.yaml'} output=/nvme/{result}\n#\n"
        keys = "".join(f"{key}: {value}\n" for key, value in self.scheme.keys)
        return (
            schema + launch + "".join(f"# {line}\n" for line in head)
            + f"\nmodel:\n  source: {self.model.source}\noutput: out/{result}\n{keys}"
            + (CALIBRATION if self.scheme.calibrated else "")
            + (f"serve:\n{self.profile.serve}" if self.profile is not None else "")
        )  # fmt: skip


def _about(model: Model, scheme: Scheme) -> Iterator[str]:
    kept = "The vision tower and merger, embeddings and head" if model.vision else "Embeddings and head"
    sizes = f"Source {model.sizes[0]} GB in BF16, result {model.sizes[1]} GB. " if model.sizes is not None else ""
    yield f"{sizes}{kept} stay BF16."
    if scheme.calibrated and model.memory is not None:
        gpu, host = model.memory
        yield f"By the plan: a GPU needs {gpu} GB of memory, a host without a GPU {host} GB with 8 threads."
    elif not scheme.calibrated:
        few, many = model.data_free
        yield f"Memory at most {few} GB with 2 threads, {many} GB with 8; no GPU."
    yield from model.notes


def shipped() -> dict[str, Shipped]:
    """All of them, by name, model by model."""
    found = []
    for model in MODELS:
        if model.memory is not None:
            found += [Shipped(f"{model.key}-{scheme.key}", model, scheme) for scheme in SCHEMES]
        for profile in PROFILES:
            if profile.model == model.key:
                name = f"{model.key}-{SCHEMES[0].key}-{profile.name}"
                found.append(Shipped(name, model, SCHEMES[0], profile))
    return {recipe.name: recipe for recipe in found}


def find(name: str) -> Shipped:
    """The recipe of a name, with or without ``.yaml``.

    Raises:
        UsageError: there is none of that name.
    """
    known = shipped()
    if (found := known.get(name.removesuffix(".yaml"))) is not None:
        return found
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "quantize recipes lists them"
    raise UsageError(f"{name}: there is no shipped recipe of this name; {hint}")
