"""Memory of the host, of this process and of the control groups that limit it."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_MEMORY = (  # limit and use, in control groups of version 2 and 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Bytes of host memory that can be had now, within a container's limit; a large number where nothing says."""
    return min(_meminfo("MemAvailable"), *(max(0, limit - used) for limit, used in _group_limits()))


def total_memory() -> int:
    """Bytes of host memory that this machine, or its container, has in all."""
    return min(_meminfo("MemTotal"), *(limit for limit, _ in _group_limits()))


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 62


def _group_limits() -> list[tuple[int, int]]:
    """Limit and use of the control group that this process sees as its root; one that limits nothing comes last."""
    found, root = [], Path("/sys/fs/cgroup")
    for limit, used in CGROUP_MEMORY:
        try:
            ceiling = (root / limit).read_text().strip()
            if ceiling != "max":
                found.append((int(ceiling), int((root / used).read_text()) - _reclaimable((root / used).parent)))
        except (OSError, ValueError):
            continue
    return [*found, (1 << 62, 0)]


def _reclaimable(group: Path) -> int:
    """Bytes of a control group that are page cache which the kernel gives back first."""
    keys = ("total_inactive_file", "inactive_file")  # with what is below the group, in version 1
    try:
        rows = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return next((int(rows[key]) for key in keys if key in rows), 0)


def rss_bytes() -> int:
    """Resident memory of this process now; 0 where the system does not say."""
    try:
        with Path("/proc/self/statm").open("rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def peak_rss_bytes() -> int:
    """The most resident memory this process has had.

    Linux counts ru_maxrss through exec, so that a child begins with its parent's peak; VmHWM does not.
    """
    try:
        with Path("/proc/self/status").open(encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` begin anew, where the system can: Linux, by clear_refs (man 5 proc)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
