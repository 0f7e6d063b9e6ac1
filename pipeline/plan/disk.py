"""Whether the result fits on its drive."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.errors import DiskFull, TooLarge
from pipeline.plan.plan import Plan
from pipeline.units import size_text


def disk_need(plan: Plan) -> int:
    """Bytes that the output's drive must have for a whole run.

    Hidden states count where they go to the same drive: two generations while one is saved, and the file they wait in.
    """
    needed = plan.output_nbytes + (16 << 20)
    if plan.calibration is not None and plan.recipe.runtime.work_directory is None:
        needed += plan.calibration.needs.hidden * (3 if plan.calibration.place == "file" else 2)
    return needed


def written_already(partial: Path) -> int:
    """Bytes on the drive that a stopped run has taken for its shards."""
    found = 0
    for path in partial.glob("*.safetensors") if partial.is_dir() else ():
        try:
            found += path.stat().st_blocks * 512
        except FileNotFoundError:  # published, or thrown away, meanwhile
            continue
    return found


def check_disk(plan: Plan, output: Path, partial: Path) -> None:
    """See whether the result fits beside what a stopped run has written already.

    Raises:
        DiskFull: not now.
        TooLarge: the drive as a whole is smaller.
    """
    needed, have = disk_need(plan), written_already(partial)
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    if needed > usage.total:
        raise TooLarge(
            f"{place}: {size_text(needed)} needed for the result, the whole drive has {size_text(usage.total)}",
            remedy="choose another output",
        )
    if usage.free + have < needed:
        raise DiskFull(
            f"{place}: {size_text(usage.free + have)} free, {size_text(needed)} needed for the result",
            remedy=f"free {size_text(needed - usage.free - have)}, or choose another output",
        )
