"""Reading a source's shards: the bytes that the plan names, or a sentence about why they are not there."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from pipeline.checkpoint.source import Checkpoint, Shard, SourceError, Tensor


def open_shard(shard: Shard) -> int:
    """A file descriptor of a shard that has not changed since its header was read."""
    assert shard.path is not None, "a run resolves its source with all shards present"
    refuse_changed(shard)
    try:
        file = os.open(shard.path, os.O_RDONLY)
    except OSError as error:
        raise SourceError(f"{shard.path}: cannot be opened any more: {error.strerror}") from None
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


def refuse_changed(shard: Shard) -> None:
    """Before a shard is read, and again before what was read of it is recorded as done."""
    assert shard.path is not None
    try:
        status = os.stat(shard.path)
    except OSError as error:
        raise SourceError(f"{shard.path}: it is gone: {error.strerror}", remedy="restore it, then run again") from None
    if status.st_size != shard.size or (shard.modified and status.st_mtime_ns != shard.modified):
        raise SourceError(
            f"{shard.path}: the file changed since the plan was made",
            remedy="let it settle, then run again: what was read of it is compared then",
        )


def announce(file: int, offset: int, nbytes: int) -> None:
    """Ask the kernel for what comes next, so that the drive never waits for the reading thread."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, nbytes, os.POSIX_FADV_WILLNEED)


def read_exactly(file: int, shard: Shard, tensor: str, offset: int, into: memoryview) -> None:
    """Fill `into` from `offset` of a shard's file; `tensor` is named in errors."""
    while into:
        try:
            count = os.preadv(file, [into], offset)
        except OSError as error:
            raise SourceError(
                f"{shard.path}: reading {tensor} failed: {error.strerror}", remedy="check the drive"
            ) from None
        if count == 0:
            raise SourceError(
                f"{shard.path}: the file ends at byte {offset:,}, inside {tensor}", remedy="fetch it again"
            )
        into, offset = into[count:], offset + count


def read_tensor(checkpoint: Checkpoint, tensor: Tensor, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes of a tensor from `start`, all of it by default; for checks, which read here and there."""
    path = checkpoint.shards[tensor.shard].path
    assert path is not None
    with path.open("rb") as file:
        return os.pread(file.fileno(), tensor.nbytes - start if count is None else count, tensor.offset + start)


def same_bytes(checkpoint: Checkpoint, one: Tensor, other: Tensor) -> bool | None:
    """Whether two tensors of a checkpoint hold the same bytes; None where a shard of theirs is not on this machine.

    Read until the first difference, and remembered for as long as the files do not change.

    Raises:
        SourceError: a file cannot be read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = checkpoint.shards[one.shard], checkpoint.shards[other.shard]
    if first.path is None or second.path is None:
        return None
    try:
        stamps = tuple(os.stat(path).st_mtime_ns for path in (first.path, second.path))
        return _same_ranges(first.path, one.offset, second.path, other.offset, one.nbytes, stamps)
    except OSError as error:
        raise SourceError(f"{error.filename or first.path}: cannot be read: {error.strerror}") from None


@lru_cache(64)
def _same_ranges(one: Path, offset: int, other: Path, start: int, nbytes: int, stamps: tuple[int, ...]) -> bool:
    """Whether `nbytes` from `offset` of a file are those from `start` of another; `stamps` are for the memory alone."""
    chunk = 16 << 20
    with one.open("rb") as first, other.open("rb") as second:
        for position in range(0, nbytes, chunk):
            count = min(chunk, nbytes - position)
            here = os.pread(first.fileno(), count, offset + position)
            if here != os.pread(second.fileno(), count, start + position):
                return False
    return True
