"""A checkpoint on disk as the plan sees it: shards, headers, config and small files. No tensor is read here.

The format of a shard is safetensors': eight bytes little-endian length N, N bytes of JSON header,
then the tensors' bytes without holes (https://github.com/huggingface/safetensors#format). Headers are
read here and not through the library, because the plan needs every tensor's place in its file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.checkpoint import directory
from pipeline.errors import PipelineError

# safetensors' word for each dtype that is read, its bytes per value, and torch's name for it
DTYPES = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"), "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"), "F8_E8M0": (1, "float8_e8m0fnu"), "I16": (2, "int16"), "U16": (2, "uint16"),
    "F16": (2, "float16"), "BF16": (2, "bfloat16"), "I32": (4, "int32"), "U32": (4, "uint32"), "F32": (4, "float32"),
    "I64": (8, "int64"), "U64": (8, "uint64"), "F64": (8, "float64"),
}  # fmt: skip
DTYPE_BYTES = {name: nbytes for name, (nbytes, _) in DTYPES.items()}
FLOAT_DTYPES = ("BF16", "F16", "F32")
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz")
MAX_SIDECAR_BYTES = 64 << 20


class SourceError(PipelineError):
    """The checkpoint cannot be used as it is.

    Attributes:
        leads_nowhere: there is nothing of its name, neither a directory nor on the hub.
    """

    kind = "source"
    leads_nowhere = False


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor as its shard's header describes it.

    Attributes:
        name: the hub's name.
        dtype: safetensors' word for it, e.g. ``BF16``.
        shape: outermost first; ``()`` is a scalar.
        shard: index into `Checkpoint.shards`.
        offset: of its first byte in the shard's file.
        nbytes: its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        name: the file's name.
        path: where it is; None for a shard whose header was read from the hub and that is not here yet.
        size: in bytes.
        header_sha256: of the JSON header, part of a run's identity.
        modified: mtime in ns, 0 where the hub's commit already names the content.
    """

    name: str
    path: Path | None
    size: int
    header_sha256: str
    modified: int


@dataclass(frozen=True)
class Checkpoint:
    """Everything known of a checkpoint before its first tensor is read."""

    label: str  # as the recipe names it
    root: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: dict[str, Tensor]  # in file order: shard by shard, by offset
    sidecars: tuple[str, ...]  # relative names of small files to carry
    left_behind: tuple[tuple[str, str], ...]  # (relative name, why it is not copied)
    revision: str | None = None  # the hub's commit

    @property
    def nbytes(self) -> int:
        """Length of all shards."""
        return sum(shard.size for shard in self.shards)


def open_checkpoint(
    root: Path, label: str | None = None, revision: str | None = None, copied: Sequence[str] = ("*",)
) -> Checkpoint:
    """Read config, index and all headers of a checkpoint directory.

    Args:
        root: the directory.
        label: as the recipe names it.
        revision: the hub's commit, if it is a snapshot.
        copied: patterns of the small files that belong to it.

    Raises:
        SourceError: one line, with the file, what is wrong and what to do.
    """
    label = label or str(root)
    config = read_config(root)
    names = _shard_names(root)
    shards: list[Shard] = []
    tensors: dict[str, Tensor] = {}
    for position, (name, expected) in enumerate(names.items()):
        path = root / name
        shard, found = read_header(path, position, dated=revision is None)
        shards.append(shard)
        add_shard(tensors, found, str(path), expected)
    if not tensors:
        raise SourceError(f"{root}: the shards hold no tensors")
    sidecars, left = list_sidecars(root, copied)
    return Checkpoint(label, root, config, tuple(shards), tensors, sidecars, left, revision)


def add_shard(tensors: dict[str, Tensor], found: dict[str, Tensor], where: str, expected: set[str] | None) -> None:
    """Add a shard's tensors to those of the shards before it, after a look at what the index says of them."""
    if expected is not None:
        if lost := sorted(expected - found.keys()):
            raise SourceError(
                f"{where}: the index promises {lost[0]} here (and {len(lost) - 1} more), the file has it not"
            )
        if extra := sorted(found.keys() - expected):
            raise SourceError(f"{where}: {extra[0]} (and {len(extra) - 1} more) is in the file but not in the index")
    if twice := sorted(found.keys() & tensors.keys()):
        raise SourceError(
            f"{where}: tensor {twice[0]} is in another shard as well", remedy="remove one of the two files"
        )
    tensors.update(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a SourceError that names the file and the place of the mistake."""
    try:
        if directory.is_pointer(path):
            raise SourceError(f"{path}: {directory.A_POINTER}", remedy=directory.pull(path.parent))
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}: byte {error.start} is not UTF-8", remedy="the file is damaged, fetch it again"
        ) from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise SourceError(f"{path}: this is not JSON ({error})", remedy="the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def read_config(root: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    if not root.is_dir():
        message, remedy = directory.no_directory(root)
        raise SourceError(message, remedy=remedy)
    path = root / "config.json"
    if not path.exists():
        message, remedy = directory.no_config(root)
        raise SourceError(message, remedy=remedy)
    return read_json(path)


def parse_index(path: Path) -> dict[str, set[str]]:
    """The index as shard name → tensor names, in the order of the shards' names.

    Raises:
        SourceError: also for a shard name that leads out of the directory.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: it has no weight_map", remedy="fetch the index again")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise SourceError(
                f"{path}: {tensor} is said to be in {name!r}, which is not a file of this directory",
                remedy="do not trust this checkpoint, fetch the index again",
            )
        if not name.endswith(".safetensors"):
            raise SourceError(
                f"{path}: {tensor} is in {name}, which is not a safetensors file; {PICKLES_REFUSED}",
                remedy=PICKLE_WAY_OUT,
            )
        shards.setdefault(name, set()).add(tensor)
    return {name: shards[name] for name in sorted(shards)}


PICKLES_REFUSED = "pickled weights can run code when they are loaded and are refused"
PICKLE_WAY_OUT = (
    "convert them once where you trust them: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors"
)


def _shard_names(root: Path) -> dict[str, set[str] | None]:
    present = sorted(p.name for p in root.glob("*.safetensors") if not directory.is_adapter(p.name))
    for name in present:
        if (target := directory.broken_link(root / name)) is not None:
            raise SourceError(f"{root}: {name} is a link that leads nowhere ({target})", remedy=directory.COPY_LINKS)
    index = root / INDEX
    if (target := directory.broken_link(index)) is not None:
        raise SourceError(f"{root}: {INDEX} is a link that leads nowhere ({target})", remedy=directory.COPY_LINKS)
    if not index.exists():
        if not present:
            raise _no_shards(root)
        if len(present) > 1:
            listed = f"{', '.join(present[:3])}{', ...' if len(present) > 3 else ''}"
            raise SourceError(
                f"{root}: {len(present)} shards ({listed}) but no {INDEX}", remedy="fetch the index as well"
            )
        return {present[0]: None}
    indexed = parse_index(index)
    missing = [name for name in indexed if name not in present]
    if len(missing) == len(indexed) and present:
        raise _stale_index(root, indexed, present)
    if missing:
        raise SourceError(
            f"{root}: the index names {len(missing)} shard(s) that are not there, first {missing[0]}",
            remedy="complete the download",
        )
    extra = [name for name in present if name not in indexed]
    if extra:
        twice = " (Mistral's own format: the same weights once more)" if extra[0].startswith("consolidated") else ""
        raise SourceError(
            f"{root}: {', '.join(extra[:3])}{twice} is not in {INDEX}",
            remedy="servers may load it too: move it away, or name a directory without it",
        )
    return dict(indexed)


def _no_shards(root: Path) -> SourceError:
    """What is there instead of safetensors."""
    names = sorted(path.name for path in root.iterdir())
    if any(directory.is_adapter(name) and name.endswith((".safetensors", ".bin")) for name in names):
        return SourceError(f"{root}: a LoRA adapter, without the weights of its model", remedy=directory.MERGE)
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return SourceError(f"{root}: the weights are pickles ({pickles[0]}): {PICKLES_REFUSED}", remedy=PICKLE_WAY_OUT)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return SourceError(
            f"{root}: the weights are GGUF ({gguf[0]}), quantized already; there are no .safetensors files",
            remedy=directory.GGUF_WAY_OUT,
        )
    return SourceError(f"{root}: there are no .safetensors files", remedy="is the download complete?")


def _stale_index(root: Path, indexed: dict[str, set[str]], present: list[str]) -> SourceError:
    """An index none of whose shards is here, beside other shards: it was left by an earlier save of the model."""
    named = f"{INDEX} names {next(iter(indexed))} and no file that is here"
    if len(present) > 1:
        listed = f"{', '.join(present[:3])}{', ...' if len(present) > 3 else ''}"
        return SourceError(f"{root}: {named} ({listed})", remedy="put the index of these shards in its place")
    _, found = read_header(root / present[0])
    lost = sorted(set().union(*indexed.values()) - found.keys())
    if not lost:
        return SourceError(
            f"{root}: {named}, while {present[0]} alone holds every tensor: the index is stale",
            remedy=f"remove {INDEX}",
        )
    return SourceError(
        f"{root}: {named}, and {present[0]} does not hold {lost[0]} (and {len(lost) - 1} more) of it: one of the two "
        "is another model's, or from an earlier save",
        remedy=f"remove {INDEX} if {present[0]} is the model, or else fetch the shards that it names",
    )


def read_header(path: Path, position: int = 0, dated: bool = True) -> tuple[Shard, dict[str, Tensor]]:
    """A shard's header, checked against the file's length.

    Args:
        path: of the safetensors file.
        position: goes into each tensor's `shard`.
        dated: whether the file's mtime is part of what identifies it.

    Returns:
        The shard, and its tensors by name in the order of their offsets.
    """
    try:
        if directory.is_pointer(path):
            raise SourceError(f"{path}: {directory.A_POINTER}", remedy=directory.pull(path.parent))
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            raw = file.read(header_length(file.read(8), size, str(path)))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None
    tensors = parse_header(raw, str(path), size, position)
    shard = Shard(path.name, path, size, hashlib.sha256(raw).hexdigest(), status.st_mtime_ns if dated else 0)
    return shard, tensors


def header_length(start: bytes, size: int, where: str) -> int:
    """The length of the JSON header, from the first bytes of a file of `size` bytes."""
    if len(start) < 8:
        raise SourceError(f"{where}: the file has {size} bytes, no safetensors header", remedy="fetch it again")
    length = int.from_bytes(start[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise SourceError(
            f"{where}: the header claims {length:,} bytes in a file of {size:,}",
            remedy="the file is damaged or truncated, fetch it again",
        )
    return length


class _Double(ValueError):
    pass


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Double(next(name for name in names if names.count(name) > 1))
    return made


def parse_header(raw: bytes, where: str, size: int, position: int) -> dict[str, Tensor]:
    """A JSON header of a file of `size` bytes as tensors in the order of their offsets."""
    damaged = "the header is damaged, fetch the file again"
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_doubles)
    except _Double as error:
        raise SourceError(f"{where}: {damaged} ({error} stands twice in it)") from None
    except (ValueError, RecursionError):
        raise SourceError(f"{where}: {damaged} (it is not JSON in UTF-8)") from None
    if not isinstance(header, dict):
        raise SourceError(f"{where}: {damaged} (it is not an object)")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise SourceError(f"{where}: {damaged} (its __metadata__ is no map from text to text)")
    start, entries = 8 + len(raw), []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise SourceError(f"{where}: {damaged} (the entry of {name!r} is malformed)")
        if dtype not in DTYPE_BYTES:
            raise SourceError(
                f"{where}: {name} has dtype {dtype!r}, which is not known here; BF16 checkpoints are what is converted"
            )
        count = DTYPE_BYTES[dtype]
        for n in shape:
            count *= n
        if end - begin != count:
            raise SourceError(f"{where}: {damaged} ({name}: {end - begin} bytes for {dtype} {list(shape)})")
        entries.append(Tensor(name, dtype, shape, position, start + begin, count))
    entries.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    expected = start
    for tensor in entries:
        if tensor.offset != expected:
            raise SourceError(f"{where}: {damaged} (a hole or an overlap before {tensor.name})")
        expected += tensor.nbytes
    if expected > size:
        raise SourceError(
            f"{where}: the file ends after {size:,} of {expected:,} bytes", remedy="it is truncated, fetch it again"
        )
    if expected < size:
        raise SourceError(f"{where}: {size - expected:,} bytes follow the last tensor", remedy="fetch the file again")
    return {tensor.name: tensor for tensor in entries}


def list_sidecars(root: Path, copied: Sequence[str] = ("*",)) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Small files to carry, and the rest with the reason. Hidden files and earlier results are neither.

    Args:
        root: the checkpoint's directory.
        copied: only names that fit one of these patterns; a hub's cache may hold more of a repository than was asked.
    """
    kept, left = [], []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        first = name.split("/")[0]
        if any(part.startswith(".") for part in name.split("/")) or name == INDEX or first == "quantize":
            continue
        if path.parent == root and path.suffix == ".safetensors" and not directory.is_adapter(name):
            continue
        if (target := directory.broken_link(path)) is not None:
            left.append((name, f"{directory.LEADS_NOWHERE}: {target}"))
        elif path.is_symlink() and path.is_dir():
            left.append((name, directory.TO_A_DIRECTORY))
        elif not path.is_file():
            continue
        elif directory.is_adapter(name):
            left.append((name, directory.OF_AN_ADAPTER))
        elif path.suffix in WEIGHT_SUFFIXES or ".safetensors" in path.name or name.endswith(".index.json"):
            left.append((name, "weights in another format"))
        elif first == "original":
            left.append((name, "the vendor's own format"))
        elif name in ("README.md", "hf_quant_config.json"):
            left.append((name, "the result has its own"))
        elif path.stat().st_size > MAX_SIDECAR_BYTES:
            left.append((name, f"larger than {MAX_SIDECAR_BYTES >> 20} MiB"))
        elif not directory.is_read_by_servers(name) and directory.is_pointer(path):
            left.append((name, f"{directory.A_POINTER}; git lfs pull fetches that"))
        elif any(fnmatchcase(name, pattern) for pattern in copied):
            kept.append(name)
    return tuple(kept), tuple(left)


def refuse_unusable_files(checkpoint: Checkpoint) -> None:
    """Raise SourceError where the small files of a source cannot be published as they lie there.

    Pointers and broken links stand for files that a server needs. A link out of the directory would put a file of this
    machine, whatever it is, into a directory that people upload; shards may be links, since tensors alone are read.
    """
    root, names = checkpoint.root, checkpoint.sidecars
    if (root / "config.json").is_file() and "config.json" not in names:
        names = ("config.json", *names)

    def refuse(found: list[str], what: str, remedy: str) -> None:
        more = f" (and {len(found) - 1} more: {', '.join(found[1:5])})" if len(found) > 1 else ""
        raise SourceError(f"{root}: {found[0]} is {what}{more}", remedy=remedy)

    if pointers := [name for name in names if directory.is_pointer(root / name)]:
        refuse(pointers, directory.A_POINTER, directory.pull(root))
    broken = {name: target for name, _ in checkpoint.left_behind if (target := directory.broken_link(root / name))}
    if lost := [name for name in broken if directory.is_read_by_servers(name) and not directory.is_adapter(name)]:
        refuse(lost, f"a link that leads nowhere, to {broken[lost[0]]}", directory.COPY_LINKS)
    if outward := [name for name in names if directory.leads_out(root / name, root)]:
        refuse(
            outward,
            f"a link out of the source, to {os.path.realpath(root / outward[0])}, which would be published with the "
            "result",
            "put the file itself in its place if it belongs to the model, or remove the link",
        )
