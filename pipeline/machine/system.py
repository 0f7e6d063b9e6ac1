"""Where a machine is read: files below a root, an environment, Python's libraries; its control groups and processors.

Everything is read below `System.root`, so that a tree of files stands for a machine.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
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

    def text(self, *parts: str | Path) -> str:
        """A file's text; empty where it cannot be read."""
        try:
            return self.root.joinpath(*parts).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def number(self, *parts: str | Path) -> int | None:
        """A file that holds one number; None for everything else, as ``max``."""
        text = self.text(*parts)
        return int(text) if re.fullmatch(r"-?\d+", text) else None


# --- control groups ----------------------------------------------------------------------------------


def control_groups(system: System, controller: str) -> list[Path]:
    """This process's control group and all above it, for one controller (``memory``, ``cpu``); version 2 first.

    A limit of any of them holds for this process. The directories are relative to the root; some may not exist.
    """
    mount = Path("sys/fs/cgroup")
    places: list[tuple[Path, str]] = []
    for line in system.text("proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            places.append((mount, path))
        elif controller in names.split(","):
            places += [(mount / name, path) for name in (controller, names)]
    # in a container the path may be the host's, while the mount shows the container's own group
    places += [(mount, "/"), (mount / controller, "/")]
    found: dict[Path, None] = {}  # in order, each once
    for base, path in places:
        own = Path(os.path.normpath(base / path.lstrip("/")))
        found.update((group, None) for group in (own, *own.parents) if group.is_relative_to(base))
    return list(found)


# --- processors --------------------------------------------------------------------------------------


MOST_THREADS = 8  # that a run starts by itself: more wait for the drive


def cpu_quota(system: System) -> float | None:
    """Processors' worth of time that the control groups allow; None without a limit."""
    found = []
    for group in control_groups(system, "cpu"):
        words = system.text(group, "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            found.append(int(words[0]) / int(words[1]))
        quota, period = system.number(group, "cpu.cfs_quota_us"), system.number(group, "cpu.cfs_period_us")
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
    """Counted from sysfs, else from /proc/cpuinfo; where neither says, every logical CPU counts as a core."""
    topology: dict[int, tuple[str, str]] = {}
    for place in (system.root / "sys/devices/system/cpu").glob("cpu[0-9]*"):
        where = place.relative_to(system.root)
        core = system.text(where, "topology/core_id")
        if core and system.text(where, "online") != "0":
            if core.startswith("-"):  # not known: without this all would count as one
                core = place.name
            topology[int(place.name[3:])] = (system.text(where, "topology/physical_package_id"), core)
    if not topology:
        listed = system.text("proc/cpuinfo")
        topology = {int(n): ("", n) for n in re.findall(r"^processor\s*:\s*(\d+)", listed, re.MULTILINE)}
    if not topology:  # no Linux
        topology = {number: ("", str(number)) for number in range(os.cpu_count() or 1)}
    mask = re.search(r"^Cpus_allowed_list:\s*(\S+)", system.text("proc/self/status"), re.MULTILINE)
    allowed = [cpu for cpu in topology if mask is None or cpu in _cpu_list(mask[1])]
    cores = {topology[cpu] for cpu in allowed}
    return Processors(max(1, len(topology)), max(1, len(allowed)), max(1, len(cores)), cpu_quota(system))


def default_threads(system: System | None = None) -> int:
    """How many threads a run computes with unless its recipe says otherwise: the cores that it may use, 8 at most."""
    return min(MOST_THREADS, processors(System.here() if system is None else system).threads)


def _cpu_list(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


# --- Windows -----------------------------------------------------------------------------------------


def wsl(system: System) -> int | None:
    """1 or 2 inside the Windows Subsystem for Linux, else None."""
    version = system.text("proc/version")
    if "microsoft" not in version.lower():
        return None
    return 2 if "WSL2" in version or "microsoft-standard" in version else 1
