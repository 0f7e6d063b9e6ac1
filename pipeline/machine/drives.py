"""Mounts, drives and their measured rates."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.machine.system import System


@dataclass(frozen=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    device: str  # MAJOR:MINOR
    point: Path
    kind: str
    source: str
    options: frozenset[str]


def mounts(system: System) -> list[Mount]:
    """All of them; later ones hide earlier ones."""
    found = []
    for line in system.text("proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(), right.split()
        if len(fields) < 6 or len(rest) < 2:
            continue
        options = frozenset([*fields[5].split(","), *(",".join(rest[2:])).split(",")])
        found.append(Mount(fields[2], Path(_unescape(fields[4])), rest[0], _unescape(rest[1]), options))
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_of(table: Sequence[Mount], path: Path) -> Mount | None:
    """What a path lies on, whether or not it exists yet."""
    place = path.resolve()
    over = [mount for mount in table if place == mount.point or mount.point in place.parents]
    return max(enumerate(over), key=lambda pair: (len(pair[1].point.parts), pair[0]))[1] if over else None


def spins(system: System, mount: Mount) -> bool | None:
    """Whether its block device calls itself rotational; None where nothing says."""
    names = [system.root / "sys/dev/block" / mount.device]
    if mount.source.startswith("/dev/"):  # btrfs and others have no device number of their own
        names.append(system.root / "sys/class/block" / Path(mount.source).name)
    for name in names:
        if not name.exists():
            continue
        place = name.resolve()
        for block in (place, place.parent):  # a partition has no queue, its disk has
            said = system.number(str(block.relative_to(system.root.resolve())), "queue/rotational")
            if said is not None:
                return said == 1
    return None


SAMPLE = 256 << 20
BLOCK = 8 << 20
FLUSH = 32 << 20  # so that a slow drive is noticed before all of the sample waits for it
SECONDS = 1.5  # for each rate, at most, on a drive that does anything at all


def nearest(path: Path) -> Path:
    """The path, or the first of its parents that exists."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


@dataclass(frozen=True)
class Rate:
    """Bytes moved, and in how many seconds."""

    nbytes: int
    seconds: float

    @property
    def speed(self) -> float:
        """Bytes a second."""
        return self.nbytes / max(self.seconds, 1e-9)


def measure_drive(directory: Path, size: int = SAMPLE) -> tuple[Rate, Rate]:
    """Write a scratch file, flushed, and read it back past the page cache. Nothing stays behind.

    Args:
        directory: where.
        size: of the file, at most.

    Returns:
        The rates of writing and of reading.

    Raises:
        OSError: the drive's.
    """
    block = os.urandom(BLOCK)  # a compressing drive would be flattered by zeros
    number, name = tempfile.mkstemp(prefix=".quantize-doctor-", dir=directory)
    try:
        with contextlib.suppress(OSError):  # not every network drive lets an open file go
            Path(name).unlink()
        begin, written = time.perf_counter(), 0
        while written < size and (written < FLUSH or time.perf_counter() - begin < SECONDS):
            written += os.write(number, block[: size - written])
            if written % FLUSH == 0:
                os.fdatasync(number)
        os.fsync(number)
        wrote = Rate(written, time.perf_counter() - begin)
        return wrote, _read(number, written)
    finally:
        os.close(number)
        with contextlib.suppress(OSError):
            Path(name).unlink()


def measure_read(path: Path, size: int = SAMPLE) -> Rate:
    """Read the beginning of a file past the page cache. Raises OSError."""
    number = os.open(path, os.O_RDONLY)
    try:
        return _read(number, min(size, os.fstat(number).st_size))
    finally:
        os.close(number)


def _read(number: int, size: int) -> Rate:
    os.posix_fadvise(number, 0, size, os.POSIX_FADV_DONTNEED)
    begin, done = time.perf_counter(), 0
    buffer = bytearray(BLOCK)
    while done < size and (not done or time.perf_counter() - begin < SECONDS):
        count = os.preadv(number, [buffer], done)
        if count == 0:
            break
        done += count
    return Rate(done, time.perf_counter() - begin)


def existing(path: Path) -> Path:
    """The nearest place of a path that is there: the drive that it will be on."""
    while not path.exists():
        path = path.parent
    return path


def device_of(path: Path) -> int:
    """The number of the device that a path is, or will be, on."""
    return existing(path).stat().st_dev
