"""What a machine says about itself: files below a root, an environment, and where Python's libraries are.

Everything is read below `System.root`, so that a tree of files stands for a machine.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class System:
    """Where to look.

    Attributes:
        root: ``/``, or a tree with ``proc`` and ``sys``.
        environment: the variables of the run.
        site: directories with installed libraries.
    """

    root: Path
    environment: Mapping[str, str]
    site: Sequence[str]

    @classmethod
    def here(
        cls, root: Path = Path("/"), environment: Mapping[str, str] | None = None, site: Sequence[str] | None = None
    ) -> System:
        """This machine, but for what is given."""
        return cls(root, os.environ if environment is None else environment, sys.path if site is None else site)

    def text(self, *parts: str) -> str:
        """A file's text; empty where it cannot be read."""
        try:
            return self.root.joinpath(*parts).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def number(self, *parts: str) -> int | None:
        """A file that holds one number; None for everything else, as ``max``."""
        text = self.text(*parts)
        return int(text) if re.fullmatch(r"-?\d+", text) else None


# --- memory and processors ---------------------------------------------------------------------------


def meminfo(system: System) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = {}
    for line in system.text("proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _groups(system: System, controller: str) -> Iterator[Path]:
    """This process's control group and all above it, for one controller; version 2 first."""
    places = []
    for line in system.text("proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            places.append((system.root / "sys/fs/cgroup", path))
        elif controller in names.split(","):
            places += [(system.root / "sys/fs/cgroup" / name, path) for name in (controller, names)]
    # in a container the path may be the host's, while the mount shows the container's own group
    places.append((system.root / "sys/fs/cgroup", "/"))
    places.append((system.root / "sys/fs/cgroup" / controller, "/"))
    for base, path in places:
        own = Path(os.path.normpath(base / path.lstrip("/")))
        for group in (own, *own.parents):
            if group.is_relative_to(base):
                yield group


def memory_limit(system: System) -> tuple[int, int] | None:
    """The tightest limit of the control groups and what is used of it, in bytes; None without a limit.

    Files in the page cache count as used there, but make room: those that nobody used lately are left out.
    """
    found = []
    for group in _groups(system, "memory"):
        where = str(group.relative_to(system.root))
        cached = re.search(r"^(?:total_)?inactive_file (\d+)", system.text(where, "memory.stat"), re.MULTILINE)
        used = _below(system, group, "memory.current", "memory.usage_in_bytes") or 0
        used = max(0, used - int(cached[1])) if cached else used
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limit = _below(system, group, name)
            if limit is not None and 0 < limit < 1 << 60:  # version 1 says "none" with a huge number
                found.append((limit, used))
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def _below(system: System, group: Path, *names: str) -> int | None:
    for name in names:
        if (found := system.number(str(group.relative_to(system.root)), name)) is not None:
            return found
    return None


def cpu_quota(system: System) -> float | None:
    """Processors' worth of time that the control groups allow; None without a limit."""
    found = []
    for group in _groups(system, "cpu"):
        words = system.text(str(group.relative_to(system.root)), "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            found.append(int(words[0]) / int(words[1]))
        quota, period = _below(system, group, "cpu.cfs_quota_us"), _below(system, group, "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            found.append(quota / period)
    return min(found, default=None)


@dataclass(frozen=True)
class Processors:
    """What computes on the host.

    Attributes:
        online: logical CPUs of the machine.
        allowed: those that this process may run on.
        cores: physical cores among the allowed ones.
        quota: CPUs' worth of time; None without a limit.
    """

    online: int
    allowed: int
    cores: int
    quota: float | None

    @property
    def threads(self) -> int:
        """How many threads compute at full speed: one a physical core, and no more than the quota."""
        return max(1, self.cores if self.quota is None else min(self.cores, math.floor(self.quota)))


def processors(system: System) -> Processors:
    """Counted from sysfs, else from /proc/cpuinfo."""
    topology: dict[int, tuple[str, str]] = {}
    for place in (system.root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        where = str(place.relative_to(system.root))
        core = system.text(where, "topology/core_id")
        if core and system.text(where, "online") != "0":
            topology[int(place.name[3:])] = (system.text(where, "topology/physical_package_id"), core)
    if not topology:
        listed = system.text("proc/cpuinfo")
        topology = {int(n): ("", n) for n in re.findall(r"^processor\s*:\s*(\d+)", listed, re.MULTILINE)}
    mask = re.search(r"^Cpus_allowed_list:\s*(\S+)", system.text("proc/self/status"), re.MULTILINE)
    allowed = [cpu for cpu in topology if mask is None or cpu in _cpu_list(mask[1])]
    cores = {topology[cpu] for cpu in allowed}
    return Processors(max(1, len(topology)), max(1, len(allowed)), max(1, len(cores)), cpu_quota(system))


def _cpu_list(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


def wsl(system: System) -> int | None:
    """1 or 2 inside the Windows Subsystem for Linux, else None."""
    version = system.text("proc/version")
    if "microsoft" not in version.lower():
        return None
    return 2 if "WSL2" in version or "microsoft-standard" in version else 1


# --- GPUs --------------------------------------------------------------------------------------------


# --- mounts ------------------------------------------------------------------------------------------
