"""Whether the result fits on its drive."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DiskFull, TooLarge
from pipeline.machine.drives import DriveSpace, drive_space
from pipeline.plan.plan import Plan
from pipeline.units import size_text


def scratch_need(plan: Plan) -> int:
    """Bytes of scratch files: two generations of the activation cache while one is saved, and the file it lies in."""
    if plan.calibration is None:
        return 0
    return plan.calibration.needs.hidden * (3 if plan.calibration.place == "file" else 2)


def disk_need(plan: Plan) -> int:
    """Bytes that the output's drive must have for a whole run; with scratch files, where they go to the same drive."""
    needed = plan.output_nbytes + (16 << 20)
    return needed + scratch_need(plan) if plan.recipe.runtime.work_directory is None else needed


def written_already(partial: Path) -> int:
    """Bytes on the drive that a stopped run has taken for its shards; what cannot be looked at counts for nothing."""
    found = 0
    with contextlib.suppress(OSError):
        for path in partial.glob("*.safetensors") if partial.is_dir() else ():
            with contextlib.suppress(OSError):  # published, or thrown away, meanwhile
                found += path.stat().st_blocks * 512
    return found


@dataclass(frozen=True)
class DiskUse:
    """What a run takes of its drives, in bytes, and what these have.

    Attributes:
        needed: for the result, and for hidden states where they go to the same drive.
        written: what a stopped run has written of it.
        scratch: hidden states while it runs.
        drive: where the result goes.
        scratch_drive: where hidden states go, by the recipe's ``runtime.work_directory``; None for the same place.
    """

    needed: int
    written: int
    scratch: int
    drive: DriveSpace
    scratch_drive: DriveSpace | None


def disk_use(plan: Plan, output: Path, partial: Path) -> DiskUse:
    """What a run will take of its drives. Raises OSError."""
    work = plan.recipe.runtime.work_directory
    return DiskUse(
        disk_need(plan),
        written_already(partial),
        scratch_need(plan),
        drive_space(output.absolute().parent),
        None if work is None else drive_space(Path(work).expanduser()),
    )


def check_disk(plan: Plan, output: Path, partial: Path) -> None:
    """See whether the result fits beside what a stopped run has written already.

    Raises:
        DiskFull: not now.
        TooLarge: the drive as a whole is smaller.
    """
    needed, have = disk_need(plan), written_already(partial)
    space = drive_space(output.absolute().parent)
    if needed > space.total:
        raise TooLarge(
            f"{space.directory}: {size_text(needed)} needed for the result, the whole drive has "
            f"{size_text(space.total)}",
            remedy="choose another output",
        )
    if space.free + have < needed:
        raise DiskFull(
            f"{space.directory}: {size_text(space.free + have)} free, {size_text(needed)} needed for the result",
            remedy=f"free {size_text(needed - space.free - have)}, or choose another output",
        )
