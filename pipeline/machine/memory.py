"""Memory of the host, of this process and of the control groups that limit it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.machine.system import System, control_groups

UNLIMITED = 1 << 60  # version 1 of control groups says "no limit" with a larger number


@dataclass(frozen=True)
class MemoryLimit:
    """What a control group allows, and what is used of it, in bytes.

    Files in the page cache count as used there, but make room: those that nobody used lately are left out.
    """

    limit: int
    used: int

    @property
    def room(self) -> int:
        """What can be had now."""
        return max(0, self.limit - self.used)


def meminfo(system: System) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = {}
    for line in system.text("proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def memory_limits(system: System) -> list[MemoryLimit]:
    """The limits of this process's control group and of all above it: each of them holds."""
    found = []
    for group in control_groups(system, "memory"):
        limits = [system.number(group, n) for n in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = system.number(group, "memory.current") or system.number(group, "memory.usage_in_bytes") or 0
        used = max(0, used - _reclaimable(system, group))
        found += [MemoryLimit(limit, used) for limit in limits if limit is not None and 0 < limit < UNLIMITED]
    return found


def _reclaimable(system: System, group: Path) -> int:
    """Bytes of a control group, and of those below it, that are page cache which the kernel gives back first."""
    text = system.text(group, "memory.stat")
    rows: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE))
    return int(rows.get("total_inactive_file") or rows.get("inactive_file") or 0)  # only version 1 tells both


def available_memory(system: System | None = None) -> int:
    """Bytes of host memory that can be had now, within the limits of all control groups around this process."""
    system = System.here() if system is None else system
    found = meminfo(system)
    free = found.get("MemAvailable", found.get("MemFree", _physical()))
    return min([free, *(limit.room for limit in memory_limits(system))])


def total_memory(system: System | None = None) -> int:
    """Bytes of host memory that there are in all for this process: the machine's, or the smallest limit's."""
    system = System.here() if system is None else system
    total = meminfo(system).get("MemTotal", _physical())
    return min([total, *(limit.limit for limit in memory_limits(system))])


def _physical() -> int:
    """For systems without /proc/meminfo."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
