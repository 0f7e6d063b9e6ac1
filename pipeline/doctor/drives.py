"""The drives of source, cache, output and scratch files: kind, room, and measured rates."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint.result import places
from pipeline.doctor.finding import Finding, Status
from pipeline.machine.drives import (
    SAMPLE,
    Mount,
    Rate,
    drive_space,
    existing,
    measure_drive,
    measure_read,
    mount_of,
    mounts,
    spins,
)
from pipeline.machine.system import System, wsl
from pipeline.plan.disk import disk_need, scratch_need, written_already
from pipeline.units import size_text

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan
    from pipeline.recipe.recipe import Recipe

OBJECT_STORES = ("s3fs", "goofys", "gcsfuse", "mount-s3", "mountpoint-s3", "blobfuse", "blobfuse2", "rclone", "davfs")
NETWORK = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "sshfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "afs", "wekafs",
    "orangefs", "juicefs", "ocfs2", "gfs2", "vboxsf", "vmhgfs-fuse", "prl_fs", "9p", "virtiofs",
)  # fmt: skip
WINDOWS = ("ntfs", "ntfs3", "fuseblk", "exfat", "vfat", "msdos")
MEMORY = ("tmpfs", "ramfs", "devtmpfs")
SMALL_FILES = 4 << 30  # vfat's longest file

ROOM = 4  # times the sample must be free, else the drive is left alone
SMALLEST = 16 << 20  # what is read in a moment says nothing
SLOW = 150e6  # bytes a second; a spinning disk's, below what a single thread casts
FASTER_THAN_SPINNING = 350e6  # virtual disks often call themselves rotational


@dataclass(frozen=True)
class Use:
    """A place that a run uses.

    Attributes:
        area: the finding's.
        path: which may not exist yet.
        key: of the recipe, or a variable: what to change.
        writes: it must take files of gigabytes, written at offsets.
        reads: bytes that the run reads there; None if not known.
        needs: bytes that it writes there; None if not known.
    """

    area: str
    path: Path
    key: str
    writes: bool
    reads: int | None = None
    needs: int | None = None


def kind_findings(system: System, table: Sequence[Mount], use: Use) -> Iterator[Finding]:
    """What a drive's file system means for its use; the room on it."""
    there = existing(use.path)
    mount = mount_of(table, use.path)
    if mount is None:
        yield Finding(
            "drive-unknown", use.area, "note", f"{use.path}: /proc/self/mountinfo does not say what it lies on"
        )
        return
    kind = mount.kind.removeprefix("fuse.")
    if "ro" in mount.options and use.writes:
        yield Finding(
            "drive-readonly",
            use.area,
            "unfit",
            f"{use.path}: {mount.point} is mounted read-only",
            f"choose another {use.key}",
        )
        return
    if use.writes and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "is no directory" if not there.is_dir() else "may not be written by this user"
        yield Finding(
            "place-not-writable",
            use.area,
            "unfit",
            f"{use.path}: {there} {why}",
            f"choose another {use.key}, or fix that",
        )
        return
    free = drive_space(there).free
    what = f"{use.path}: {kind} at {mount.point}, {size_text(free)} free"
    if use.needs is not None:
        what += f", {size_text(use.needs)} needed"
        if use.needs > free:
            yield Finding(
                "drive-short",
                use.area,
                "unfit",
                what,
                f"free {size_text(use.needs - free)}, or choose another {use.key}",
            )
            return
    yield _kind(system, mount, kind, what, use)


def _kind(system: System, mount: Mount, kind: str, what: str, use: Use) -> Finding:
    bad: Status = "warning" if use.writes else "note"
    local = f"choose a local drive (ext4, xfs) for {use.key}"
    if wsl(system) and kind in ("9p", "drvfs", "virtiofs"):
        return Finding(
            "wsl-windows-drive",
            use.area,
            "warning",
            f"{what}: a Windows drive, which WSL reaches through a file server, many times slower",
            f"keep {use.key} on WSL's own ext4, for instance below your home directory",
        )
    if kind in OBJECT_STORES:
        trouble = ": an object store, which may refuse writes at offsets, renames and locks" if use.writes else (
            ": an object store over the network, which sets the pace"
        )  # fmt: skip
        return Finding(
            "drive-object-store",
            use.area,
            bad,
            what + trouble,
            f"{local}, and copy the result there" if use.writes else local,
        )
    if kind in NETWORK:
        trouble = (
            ": shared or over the network; its server decides about speed, locks and what a rename leaves visible"
            if use.writes
            else ": shared or over the network, which sets the pace"
        )
        return Finding(
            "drive-network",
            use.area,
            bad,
            what + trouble,
            f"{local}, and move the result afterwards" if use.writes else local,
        )
    if kind in WINDOWS:
        trouble = ": a Windows file system, slow from here"
        if kind in ("vfat", "msdos"):
            trouble = f": no file there can be longer than {size_text(SMALL_FILES)}"
            local += ", or set shard_size: 4GB"
        return Finding("windows-file-system", use.area, bad, what + trouble, local)
    if kind in MEMORY and use.writes:
        return Finding(
            "drive-in-memory",
            use.area,
            "warning",
            f"{what}: it lies in memory, takes it from the run, and ends with the machine",
            local,
        )
    if kind == "overlay" and use.writes:
        return Finding(
            "drive-container-layer",
            use.area,
            "warning",
            f"{what}: a container's own layer, slow, and gone with the container",
            f"mount a volume into the container (docker -v) and choose it for {use.key}",
        )
    if spins(system, mount) and not re.match(r"/dev/(vd|xvd)", mount.source):
        return Finding(
            "drive-spinning",
            use.area,
            "note",
            f"{what}: a spinning disk, which sets the pace",
            f"choose an SSD for {use.key}, if there is one",
        )
    return Finding("drive-fit", use.area, "ok", what)


# --- rates -------------------------------------------------------------------------------------------


def judge(use: Use, wrote: Rate | None, read: Rate, spinning: bool | None = None) -> Finding:
    """Measured rates as a finding, with what they mean for this run."""
    parts = []
    if wrote is not None:
        parts.append(f"writes {size_text(wrote.speed)}/s" + _means(use.needs, wrote))
    parts.append(f"reads {size_text(read.speed)}/s" + _means(use.reads, read))
    text = f"{existing(use.path)}: {', '.join(parts)}, measured"
    slowest = min(rate.speed for rate in (wrote, read) if rate is not None)
    if slowest < SLOW:
        kind = " (a spinning disk)" if spinning else ""
        return Finding(
            "drive-slow", use.area, "note", f"{text}{kind}; it sets the pace", f"choose a faster drive for {use.key}"
        )
    if spinning and slowest > FASTER_THAN_SPINNING:
        text += "; it calls itself a spinning disk and is faster"
    return Finding("drive-rate", use.area, "ok", text)


def _means(nbytes: int | None, rate: Rate) -> str:
    if not nbytes or nbytes < rate.speed:  # not worth a word
        return ""
    return f" (about {nbytes / rate.speed:.0f} s for {size_text(nbytes)})"


def rate_findings(system: System, table: Sequence[Mount], use: Use, shard: Path | None) -> Iterator[Finding]:
    """Measure a drive: by a scratch file where a run writes, by a shard where it reads."""
    there = existing(use.path)
    mount = mount_of(table, use.path)
    spinning = spins(system, mount) if mount is not None else None
    try:
        if use.writes:
            if mount is not None and mount.kind in MEMORY:
                return
            free = drive_space(there).free
            if free < ROOM * SAMPLE:
                yield Finding(
                    "drive-not-measured",
                    use.area,
                    "note",
                    f"{there}: not measured, {size_text(free)} are too little room for it",
                )
                return
            yield judge(use, *measure_drive(there), spinning)
        elif shard is not None and shard.stat().st_size >= SMALLEST:
            yield judge(use, None, measure_read(shard), spinning)
    except OSError as error:
        what = "written" if use.writes else f"read: {shard}"
        yield Finding(
            "drive-failing",
            use.area,
            "unfit",
            f"{there}: it cannot be {what}: {error.strerror}",
            f"fix that, or choose another {use.key}",
        )


# --- all places --------------------------------------------------------------------------------------


def drive_findings(
    system: System, recipe: Recipe | None, plan: Plan | None, cache: Path, measure: bool
) -> Iterator[Finding]:
    """Source, cache, output and work directory of a recipe; without one the cache and the current directory."""
    table = mounts(system)
    shard = None
    if plan is not None:
        here = [s.path for s in plan.checkpoint.shards if s.path is not None and s.path.exists()]
        shard = max(here, key=lambda path: path.stat().st_size, default=None)
    for use in _uses(recipe, plan, cache):
        found = list(kind_findings(system, table, use))
        yield from found
        if measure and use.area != "cache" and all(finding.status != "unfit" for finding in found):
            yield from rate_findings(system, table, use, shard)


def _uses(recipe: Recipe | None, plan: Plan | None, cache: Path) -> Iterator[Use]:
    absent = sum(shard.size for shard in plan.checkpoint.shards if shard.path is None) if plan is not None else None
    if recipe is not None:
        source = Path(recipe.model.source).expanduser()
        if plan is not None:
            source = plan.checkpoint.root
        if source.exists():
            yield Use("source", source, "model.source", False, reads=plan.read_nbytes if plan is not None else None)
    download = recipe is not None and not Path(recipe.model.source).expanduser().exists()
    yield Use("cache", cache, "HF_HOME", download, needs=absent or None)
    if recipe is None:
        yield Use("output", Path.cwd(), "output", True)
        return
    output, partial = places(recipe.output)
    needs = None
    if plan is not None and not output.exists():
        needs = max(0, disk_need(plan) - written_already(partial))
    yield Use("output", output.parent, "output", True, needs=needs)
    if recipe.runtime.work_directory is not None:
        work = Path(recipe.runtime.work_directory).expanduser().absolute()
        scratch = scratch_need(plan) if plan is not None else 0
        yield Use("work", work, "runtime.work_directory", True, needs=scratch or None)
