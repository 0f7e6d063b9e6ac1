"""Output shards whose layout is known: made at their full length, then filled in place, in any order."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.checkpoint.layout import OutputShard

_WRITE_NOW = 2  # SYNC_FILE_RANGE_WRITE: start writing dirty pages out, wait for nothing


class ShardWriter:
    """Writes at given offsets of a directory's shards and flushes what it wrote.

    Opening makes every shard: header, full length, no data. A shard that is there already, with its header
    and length right, is kept: a resumed run fills in the rest.
    """

    def __init__(self, directory: Path, shards: tuple[OutputShard, ...]) -> None:
        self._files: list[int] = []
        self._dirty: set[int] = set()
        self._sync_range = _sync_file_range()
        try:
            for shard in shards:
                file = os.open(directory / shard.name, os.O_RDWR | os.O_CREAT, 0o666)
                self._files.append(file)
                if not _whole(file, shard):
                    os.ftruncate(file, shard.size)
                    _write_all(file, memoryview(shard.header), 0)
                    self._dirty.add(len(self._files) - 1)
            sync_directory(directory)
        except BaseException:
            self.close()
            raise

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of shard `shard` and let the device begin."""
        _write_all(self._files[shard], data, offset)
        self._dirty.add(shard)
        if self._sync_range is not None and len(data) >= 1 << 20:
            self._sync_range(self._files[shard], offset, len(data), _WRITE_NOW)  # a hint; flush() is what counts

    def flush(self) -> None:
        """Return when everything written so far is on the device."""
        for shard in sorted(self._dirty):
            _sync_data(self._files[shard])
        self._dirty.clear()

    def close(self) -> None:
        """Close the files; what was not flushed may be lost in a power cut."""
        for file in self._files:
            os.close(file)
        self._files.clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lost_shards(directory: Path, shards: tuple[OutputShard, ...]) -> set[int]:
    """The shards that are not there at their full length with their header: nothing written to them can be trusted."""
    lost = set()
    for index, shard in enumerate(shards):
        try:
            file = os.open(directory / shard.name, os.O_RDONLY)
        except FileNotFoundError:
            lost.add(index)
            continue
        try:
            if not _whole(file, shard):
                lost.add(index)
        finally:
            os.close(file)
    return lost


def _whole(file: int, shard: OutputShard) -> bool:
    return os.fstat(file).st_size == shard.size and os.pread(file, len(shard.header), 0) == shard.header


_sync_data = getattr(os, "fdatasync", os.fsync)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", call)


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable (new names, renames)."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no directories
            raise
    finally:
        os.close(file)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file durably and all at once: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def sync_all(paths: Iterable[Path]) -> None:
    """fsync files that others wrote."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def is_empty_directory(path: Path) -> bool:
    """Whether something made a place for a result, and put nothing into it; a rename takes that place."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def publish(partial: Path, output: Path, replace: bool) -> bool:
    """Give the finished directory its name: one rename.

    Args:
        partial: the finished directory.
        output: its name from now on.
        replace: whether a directory of that name may be exchanged for it, in one step; it is then left as `partial`.

    Returns:
        Whether two directories were exchanged.

    Raises:
        PipelineError: `output` exists and `replace` is false, or the file system cannot exchange two names.
    """
    exchanged = output.exists() and not is_empty_directory(output)
    if exchanged:
        if not replace:
            raise PipelineError(f"{output}: it appeared while this run was under way", remedy="move it, then run again")
        exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if exchange is None or exchange(here, os.fsencode(partial), here, os.fsencode(output), swap) != 0:
            raise PipelineError(
                f"{output}: this file system cannot exchange two directories in one step",
                remedy=f"remove {output}, run again",
            )
    else:
        os.rename(partial, output)
    sync_directory(output.parent)
    return exchanged


def json_bytes(value: Any) -> bytes:
    """A value as the JSON text that records are written in: indented by two, UTF-8, with a line's end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
