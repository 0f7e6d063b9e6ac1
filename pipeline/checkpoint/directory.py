"""What stands in a directory where a checkpoint is expected: Git LFS pointers, links, adapters, other formats."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

POINTERS = tuple(
    b"version " + place
    for place in (b"https://git-lfs.github.com/spec/v", b"https://hawser.github.com/spec/v", b"http://git-media.io/v")
)
POINTER_BYTES = 1024  # a pointer is shorter (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)
READ_BY_SERVERS = ("*.json", "*.txt", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "*.py")
# of PEFT, MLX and diffusers; full weights have other names
ADAPTERS = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.bin", "adapters*.safetensors",
            "adapter_model.safetensors.index.json", "pytorch_lora_weights*.safetensors")  # fmt: skip
A_POINTER = "a Git LFS pointer, not the file itself"
OF_AN_ADAPTER = "of a LoRA adapter, which is not applied: the result is the model of the shards alone"
LEADS_NOWHERE = "a link that leads nowhere"
TO_A_DIRECTORY = "a link to a directory, which is not followed"
WORTH_A_NOTE = (A_POINTER, OF_AN_ADAPTER, LEADS_NOWHERE, TO_A_DIRECTORY)


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in the place of one that Git LFS keeps. OSError: it cannot be read."""
    if path.stat().st_size > POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(64).startswith(POINTERS)


def pull(root: Path) -> str:
    """The remedy for pointers in `root`."""
    return f"run git lfs pull in {root}"


def broken_link(path: Path) -> str | None:
    """Where a link points that leads nowhere; None for whatever is there, or is no link."""
    return str(path.readlink()) if path.is_symlink() and not path.exists() else None


def leads_out(path: Path, root: Path) -> bool:
    """Whether a file of `root` is a link to a place elsewhere on this machine.

    A hub cache keeps contents as ``models--ORG--NAME/blobs/HASH`` and links to them from its snapshots; older downloads
    into a directory (``local_dir``) link there, too.
    """
    real, base = path.resolve(), root.resolve()
    if real.is_relative_to(base):
        return False
    repository = real.parent.parent.name
    if real.parent.name == "blobs" and repository.startswith(("models--", "datasets--", "spaces--")):
        return False
    own_blobs = base.parent.parent / "blobs"
    return base.parent.name != "snapshots" or real.parent != own_blobs.resolve()


def is_adapter(name: str) -> bool:
    """Whether a file, by its name, belongs to a LoRA adapter and not to a model's own weights."""
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in ADAPTERS)


def is_read_by_servers(name: str) -> bool:
    """Whether a small file may decide on what a server does, unlike a picture or a table of results."""
    return any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in READ_BY_SERVERS)


def notes(left_behind: Iterable[tuple[str, str]]) -> list[str]:
    """Sentences about files that are left out although somebody may have wanted them; (name, reason) as listed."""
    named: dict[str, list[str]] = {}
    for name, reason in left_behind:
        if reason.startswith(WORTH_A_NOTE):
            named.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in named.items()]


def no_directory(path: Path) -> tuple[str, str | None]:
    """What is wrong with a name that is no directory, and what to do: message and remedy."""
    if path.is_file():
        if path.suffix == ".gguf":
            return f"{path}: a GGUF file, whose weights are quantized already", GGUF_WAY_OUT
        return f"{path}: a file; a checkpoint is a directory", f"name the directory that it lies in: {path.parent}"
    if (target := broken_link(path)) is not None:
        return f"{path}: a link that leads nowhere ({target})", "name the directory itself"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        return (
            f"{path}: no such directory",
            f"if it is a hub id, download it (hf download {path} --local-dir DIR) and name that directory",
        )
    return f"{path}: no such directory", "check the path"


GGUF_WAY_OUT = "name the original checkpoint, a directory with config.json and safetensors"


def no_config(root: Path) -> tuple[str, str | None]:
    """What a directory without config.json is, as far as its files tell: message and remedy."""
    if (target := broken_link(root / "config.json")) is not None:
        return f"{root}: config.json is a link that leads nowhere ({target})", COPY_LINKS
    names = sorted(path.name for path in root.iterdir())
    snapshots = _snapshots(root)
    if snapshots:
        others = "" if len(snapshots) == 1 else f" ({len(snapshots)} are there)"
        return (
            f"{root}: the root of a hub cache's repository; its revisions lie in snapshots/",
            f"name one of them{others}: {snapshots[0]}",
        )
    if (root / "snapshots").is_dir():
        return f"{root}: the root of a hub cache's repository, in whose snapshots/ no revision is", None
    repositories = [name for name in names if name.startswith("models--")] or (
        [f"hub/{path.name}" for path in sorted((root / "hub").glob("models--*"))]
    )
    if repositories:
        one = (_snapshots(root / repositories[0]) or [root / repositories[0] / "snapshots" / "REVISION"])[0]
        return f"{root}: a hub cache, which holds many repositories", f"name a hub id, or one snapshot: {one}"
    if any(is_adapter(name) for name in names) and not any(name.startswith("model") for name in names):
        return f"{root}: a LoRA adapter, without the model that it belongs to", MERGE
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{root}: GGUF files ({gguf[0]}), whose weights are quantized already, and no config.json", GGUF_WAY_OUT
    if "model_index.json" in names:
        return f"{root}: a diffusers pipeline, which is several models", "name the directory of one of them"
    if "params.json" in names:
        return (
            f"{root}: a model in its vendor's own format (params.json), without a config.json",
            "name the checkpoint in the format of transformers",
        )
    inner = [path.parent for path in sorted(root.glob("*/config.json"))]
    if inner:
        return f"{root}: there is no config.json here, but there is one in {inner[0].name}/", f"name {inner[0]}"
    return f"{root}: there is no config.json", "name the directory of a Hugging Face checkpoint"


COPY_LINKS = "a hub cache was copied without its blobs: copy the snapshot with cp -rL, or fetch it again"
MERGE = "merge it into its base model first (PEFT's merge_and_unload, then save_pretrained) and name that directory"


def _snapshots(root: Path) -> list[Path]:
    """The revisions that a hub cache has of a repository; the one that ``main`` names comes first."""
    found = [path.parent for path in sorted((root / "snapshots").glob("*/config.json"))]
    main = root / "refs" / "main"
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    return sorted(found, key=lambda path: path.name != commit)
