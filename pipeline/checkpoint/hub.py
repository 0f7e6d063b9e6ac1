"""Hub ids become directories: huggingface_hub downloads what is needed, and nothing else.

HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean everywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import source
from pipeline.checkpoint.source import Checkpoint, SourceError, open_checkpoint
from pipeline.errors import UsageError, seen_from

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# README.md for its front matter alone: the result has its own
SMALL_FILES = [
    "*.json", "*.txt", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "README.md",
]  # fmt: skip
FIRST_READ = 1 << 20  # most headers fit into it
# what people call the directories that they keep checkpoints in; hardly an organisation's name
LOCAL_WORDS = frozenset({
    "cache", "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "download", "downloads", "export", "exports",
    "local", "merged", "model", "models", "out", "output", "outputs", "result", "results", "run", "runs", "src", "tmp",
    "weights", "work",
})  # fmt: skip
OF_OTHER_FORMATS = ["*.safetensors", "original/*", "onnx/*", "*.msgpack", "*.h5", "*.gguf", "*.bin", "*.pt", "*.pth"]
NEVER = ["*.safetensors", "original/*", "onnx/*", "*.msgpack", "*.h5", "*.gguf", ".*"]


def _nowhere(message: str, remedy: str) -> SourceError:
    """The error over a name that leads to nothing: no directory, and nothing on the hub or in its cache."""
    error = SourceError(message, remedy=remedy)
    error.leads_nowhere = True
    return error


def _online() -> str:
    """How to reach the hub: what keeps huggingface_hub from it is named where it is set."""
    return "unset HF_HUB_OFFLINE, " if os.environ.get("HF_HUB_OFFLINE") else "connect, "


def resolve(
    name: str,
    revision: str | None,
    headers_only: bool = False,
    asked: tuple[str, str, str] = ("model.source", "model.revision", "model.revision: main"),
    whole: bool = False,
) -> Checkpoint:
    """The checkpoint that a recipe's ``model.source`` names.

    Args:
        name: a directory, or a hub id.
        revision: branch, tag or commit; only for a hub id.
        headers_only: of a hub id that is not in the cache, fetch the shards' headers alone (by range
            requests) and leave the shards where they are: enough for a plan.
        asked: what `name` and `revision` are called where they were given, for errors, and how a branch is written.
        whole: of a hub id, fetch all that lies beside the weights, such as the records of a run of this tool.

    Raises:
        UsageError: the name is neither.
        SourceError: it leads nowhere (`leads_nowhere`), or the hub or the directory has no usable checkpoint.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        if revision is not None:
            raise UsageError(f"{asked[1]}: {name} is a directory; a revision belongs to a hub id")
        if not path.exists():
            raise _nowhere(
                f"{path}: no such directory{seen_from(path)}",
                remedy="name a directory with a checkpoint, or a hub id (org/name)",
            )
        return open_checkpoint(path, name)
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"{asked[0]}: {name!r} is no directory{seen_from(path)}, and no hub id (org/name)")
    if revision is None and (why := looks_local(name)) and not _is_cached(name):
        raise _nowhere(
            f"{name}: no such directory{seen_from(path)}; {why}, so it is not looked for on the hub",
            remedy=f"correct the path, or, if it is a hub id, say so by its revision ({asked[2]})",
        )
    return _from_hub(name, revision, headers_only, whole)


def with_revision(text: str) -> tuple[str, str | None]:
    """The name and the revision of ``org/name@revision``; anything else has none."""
    name, at, revision = text.rpartition("@")
    is_id = bool(at and revision) and HUB_ID.fullmatch(name) is not None and not Path(text).expanduser().exists()
    return (name, revision) if is_id else (text, None)


def looks_local(name: str) -> str | None:
    """Why a name of the form org/name was probably meant as a path; None where nothing says so."""
    first = Path(name).parts[0]
    if Path(first).is_dir():
        return f"{first} is a directory here"
    return f"{first}/ is what directories are called" if first.lower() in LOCAL_WORDS else None


def _is_cached(name: str) -> bool:
    """Whether something of a hub id is in the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()


def _from_hub(name: str, revision: str | None, headers_only: bool, whole: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download

    def fetch(**patterns: Any) -> Path:
        return Path(_said(name, revision, lambda: snapshot_download(name, revision=revision, **patterns)))

    if whole:
        root = fetch(ignore_patterns=OF_OTHER_FORMATS)
    else:
        root = fetch(allow_patterns=SMALL_FILES, ignore_patterns=NEVER)
    commit = root.name
    if not (root / "config.json").exists():
        raise SourceError(
            f"{name}: no config.json in the cache or on the hub at revision {revision or 'main'}",
            remedy="is it a model for transformers, and is HF_HUB_OFFLINE set before a first download?",
        )
    shards = _wanted_shards(name, root, commit)
    if any(not (root / shard).exists() for shard in shards):
        if headers_only:
            return _remote(name, root, commit, shards)
        root = fetch(allow_patterns=list(shards), ignore_patterns=None)
        absent = [shard for shard in shards if not (root / shard).exists()]
        if absent:
            raise SourceError(
                f"{name}: {absent[0]} is not in the cache and cannot be fetched",
                remedy=f"{_online()}or complete the cache",
            )
    return open_checkpoint(root, name, commit, SMALL_FILES)


def complete(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """The checkpoint with these shards in place: those of a hub id whose headers alone are here are fetched.

    Args:
        checkpoint: as `resolve` gave it.
        names: of shards.
    """
    wanted = {shard.name for shard in checkpoint.shards if shard.path is None} & set(names)
    if not wanted:
        return checkpoint
    from huggingface_hub import snapshot_download

    name, commit = checkpoint.label, checkpoint.revision
    root = Path(_said(name, commit, lambda: snapshot_download(name, revision=commit, allow_patterns=sorted(wanted))))
    shards = tuple(replace(s, path=root / s.name) if s.name in wanted else s for s in checkpoint.shards)
    return replace(checkpoint, shards=shards)


def hub_name(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The hub id and commit of a checkpoint, also of a directory inside the hub's cache; None where unknown."""
    if checkpoint.revision is not None:
        return checkpoint.label, checkpoint.revision
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)$", str(checkpoint.root.absolute()))
    return (f"{cached[1]}/{cached[2]}", cached[3]) if cached else (None, None)


def public_name(checkpoint: Checkpoint) -> str:
    """What a checkpoint is called where others read it: its hub id, or its directory's name."""
    name = checkpoint.root.name
    return hub_name(checkpoint)[0] or (name if name not in ("", "..") else checkpoint.root.resolve().name)


def _wanted_shards(name: str, root: Path, commit: str) -> dict[str, set[str] | None]:
    """The shards by name, with the tensors that the index promises in each."""
    if (root / source.INDEX).exists():
        return dict(source.parse_index(root / source.INDEX))
    alone: dict[str, set[str] | None] = {"model.safetensors": None}
    if (root / "model.safetensors").exists():
        return alone
    if (root / "pytorch_model.bin.index.json").exists() or (root / "pytorch_model.bin").exists():
        raise SourceError(f"{name}: {source.PICKLES_REFUSED}", remedy=source.PICKLE_WAY_OUT)
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return alone
    files = _said(name, commit, lambda: HfApi().list_repo_files(name, revision=commit))
    top = [file for file in files if "/" not in file]
    if "model.safetensors" not in top:
        if any(file.endswith(source.PICKLE_SUFFIXES) for file in top):
            raise SourceError(f"{name}: {source.PICKLES_REFUSED}", remedy=source.PICKLE_WAY_OUT)
        raise SourceError(f"{name}: neither {source.INDEX} nor model.safetensors is on the hub at {commit}")
    return alone


def _remote(name: str, root: Path, commit: str, shards: dict[str, set[str] | None]) -> Checkpoint:
    """A checkpoint of which only headers are here, fetched by range requests; `Shard.path` is None."""
    found: list[source.Shard] = []
    tensors: dict[str, source.Tensor] = {}
    for position, (shard, expected) in enumerate(shards.items()):
        where = f"{name}/{shard}"
        start, size = _fetch_start(name, commit, shard, FIRST_READ)
        length = source.header_length(start, size, where)
        if 8 + length > len(start):
            start, _ = _fetch_start(name, commit, shard, 8 + length)
        raw = start[8 : 8 + length]
        source.add_shard(tensors, source.parse_header(raw, where, size, position), where, expected)
        found.append(source.Shard(shard, None, size, hashlib.sha256(raw).hexdigest(), 0))
    sidecars, left = source.list_sidecars(root, SMALL_FILES)
    return Checkpoint(name, root, source.read_config(root), tuple(found), tensors, sidecars, left, commit)


def _fetch_start(name: str, commit: str, shard: str, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a shard on the hub, and its length."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def get() -> tuple[bytes, int]:
        headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}"}
        url = hf_hub_url(name, shard, revision=commit)
        answer = get_session().get(url, headers=headers, follow_redirects=True, timeout=60)
        hf_raise_for_status(answer)
        return answer.content[:count], int(answer.headers["Content-Range"].rpartition("/")[2])

    fetched: tuple[bytes, int] = _said(name, commit, get)
    return fetched


def _said(name: str, revision: str | None, call: Callable[[], Any]) -> Any:
    """Run a hub call; its failures become one line with a remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return call()
    except GatedRepoError:
        raise SourceError(
            f"{name}: the model is gated", remedy="accept its terms on the hub and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise _nowhere(
            f"{name}: there is no revision {revision}", remedy="see the model's page for its branches"
        ) from None
    except RepositoryNotFoundError:
        raise _nowhere(
            f"{name}: not on the hub, or private, and no directory{seen_from(Path(name))}",
            remedy="check the name, or set HF_TOKEN",
        ) from None
    except LocalEntryNotFoundError:
        raise _nowhere(
            f"{name}: no directory{seen_from(Path(name))}, not in the cache, and the hub cannot be reached",
            remedy=f"{_online()}or name a directory",
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{name}: {' '.join(str(error).split())}") from None
    except Exception as error:
        # the client library's own errors (httpx, or httpx2 in huggingface_hub 2) are no OSErrors
        transport = type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "requests"))
        if not transport and not isinstance(error, (HfHubHTTPError, OSError, KeyError)):
            raise
        raise SourceError(f"{name}: the hub did not answer as expected: {' '.join(str(error).split())}") from None
