"""Hub ids become directories: huggingface_hub downloads what is needed, and nothing else.

HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean everywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import source
from pipeline.checkpoint.source import Checkpoint, SourceError, open_checkpoint
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = [
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "merges*",
    "vocab*",
]
NEVER = ["*.safetensors", "original/*", "onnx/*", "*.msgpack", "*.h5", "*.gguf", ".*", "README.md"]


def resolve(name: str, revision: str | None, headers_only: bool = False) -> Checkpoint:
    """The checkpoint that a recipe's ``model.source`` names.

    Args:
        name: a directory, or a hub id.
        revision: branch, tag or commit; only for a hub id.
        headers_only: of a hub id that is not in the cache, fetch the shards' headers alone (by range
            requests) and leave the shards where they are: enough for a plan.

    Raises:
        UsageError: the name is neither.
        SourceError: the hub or the directory has no usable checkpoint.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        if revision is not None:
            raise UsageError(f"model.revision: {name} is a directory; a revision belongs to a hub id")
        return open_checkpoint(path, name)
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"model.source: {name!r} is no directory, and no hub id (org/name)")
    return _from_hub(name, revision, headers_only)


def _from_hub(name: str, revision: str | None, headers_only: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download

    def fetch(**patterns: Any) -> Path:
        return Path(_said(name, revision, lambda: snapshot_download(name, revision=revision, **patterns)))

    root = fetch(allow_patterns=SMALL_FILES, ignore_patterns=NEVER)
    commit = root.name
    if not (root / "config.json").exists():
        raise SourceError(
            f"{name}: no config.json in the cache or on the hub at revision {revision or 'main'}; "
            "is it a model for transformers, and is HF_HUB_OFFLINE set before a first download?"
        )
    shards = _wanted_shards(name, root, commit)
    if any(not (root / shard).exists() for shard in shards):
        if headers_only:
            return _remote(name, root, commit, shards)
        root = fetch(allow_patterns=shards, ignore_patterns=None)
        absent = [shard for shard in shards if not (root / shard).exists()]
        if absent:
            raise SourceError(
                f"{name}: {absent[0]} is not in the cache and cannot be fetched; "
                "unset HF_HUB_OFFLINE or complete the cache"
            )
    return open_checkpoint(root, name, revision=commit)


def _wanted_shards(name: str, root: Path, commit: str) -> list[str]:
    if (root / source.INDEX).exists():
        return list(source.parse_index(root / source.INDEX))
    if (root / "model.safetensors").exists():
        return ["model.safetensors"]
    if (root / "pytorch_model.bin.index.json").exists() or (root / "pytorch_model.bin").exists():
        raise SourceError(f"{name}: {source.PICKLE_WAY_OUT}")
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return ["model.safetensors"]
    files = _said(name, commit, lambda: HfApi().list_repo_files(name, revision=commit))
    top = [file for file in files if "/" not in file]
    if "model.safetensors" not in top:
        if any(file.endswith(source.PICKLE_SUFFIXES) for file in top):
            raise SourceError(f"{name}: {source.PICKLE_WAY_OUT}")
        raise SourceError(f"{name}: neither {source.INDEX} nor model.safetensors is on the hub at {commit}")
    return ["model.safetensors"]


def _remote(name: str, root: Path, commit: str, shards: list[str]) -> Checkpoint:
    """A checkpoint of which only headers are here; `Shard.path` is None."""
    from huggingface_hub import HfApi

    api = HfApi()
    found: list[source.Shard] = []
    tensors: dict[str, source.Tensor] = {}
    metadata: dict[str, dict[str, str]] = {}
    for position, shard in enumerate(shards):

        def fetch_header(shard: str = shard) -> Any:
            return api.parse_safetensors_file_metadata(name, shard, revision=commit)

        parsed = _said(name, commit, fetch_header)
        end = 0
        for tensor, entry in sorted(parsed.tensors.items(), key=lambda item: item[1].data_offsets[0]):
            begin, end = entry.data_offsets
            tensors[tensor] = source.Tensor(tensor, str(entry.dtype), tuple(entry.shape), position, begin, end - begin)
        digest = hashlib.sha256(json.dumps(sorted(parsed.tensors)).encode()).hexdigest()
        found.append(source.Shard(shard, None, end, digest, 0))
        metadata[shard] = parsed.metadata or {}
    sidecars, left = source.list_sidecars(root)
    config = source.read_config(root)
    return Checkpoint(name, root, config, tuple(found), tensors, sidecars, left, commit, metadata)


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
        raise SourceError(f"{name}: the model is gated; accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise SourceError(f"{name}: there is no revision {revision}; see the model's page for its branches") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{name}: not on the hub, or private; check the name, or set HF_TOKEN") from None
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{name}: not in the cache, and the hub cannot be reached; connect, unset HF_HUB_OFFLINE, "
            "or name a directory as model.source"
        ) from None
    except HFValidationError as error:
        raise UsageError(f"model.source: {' '.join(str(error).split())}") from None
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{name}: the hub did not answer as expected: {' '.join(str(error).split())}") from None
