"""A tree of files that looks like a machine, for the doctor to look at; each test changes one thing of it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from pipeline import doctor
from pipeline.doctor.finding import Finding
from pipeline.recipe import recipe
from tests.conftest import ROOT

GIB = 1 << 30
H200 = "0, GPU-aaaa, NVIDIA H200, 580.95.05, 9.0, 143771, 143100"
LOADED = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 13\n"
WSL2 = "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@build) #1 SMP\n"


class Machine:
    """A tree that looks like a machine: 8 cores with two threads each, 64 GiB, an H200, an SSD with ext4."""

    def __init__(self, place: Path) -> None:
        self.place, self.root, self.site = place, place / "root", place / "site"
        self.environment = {"PATH": f"{place}/bin", "HOME": f"{place}/home", "OMP_NUM_THREADS": "8"}
        (place / "home").mkdir(parents=True)
        self.write("proc/version", "Linux version 6.8.0-generic (build@host) #1 SMP\n")
        self.memory(total=64 * GIB, free=60 * GIB)
        self.write("proc/self/status", "Name:\tpython\nCpus_allowed_list:\t0-15\n")
        self.write(
            "proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024  524288  files\n"
        )
        self.write("proc/self/cgroup", "0::/user.slice/session.scope\n")
        for cpu in range(16):
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", "0\n")
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", f"{cpu // 2}\n")
        self.rotational("0")
        self.write("sys/devices/pci0/block/sda/sda2/partition", "2\n")
        self.link("sys/dev/block/8:2", "../../devices/pci0/block/sda/sda2")
        self.mounts()
        self.write("proc/driver/nvidia/version", LOADED)
        self.write("dev/nvidiactl", "")
        self.smi(H200)
        self.libraries()

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def link(self, name: str, target: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).symlink_to(target)

    def memory(self, total: int, free: int, swap: tuple[int, int] = (0, 0)) -> None:
        values = {"MemTotal": total, "MemAvailable": free, "SwapTotal": swap[0], "SwapFree": swap[1]}
        self.write("proc/meminfo", "".join(f"{name}: {value // 1024} kB\n" for name, value in values.items()))

    def rotational(self, value: str) -> None:
        self.write("sys/devices/pci0/block/sda/queue/rotational", f"{value}\n")

    def mounts(self, *more: str, root: str = "8:2 / / rw,relatime - ext4 /dev/sda2 rw") -> None:
        lines = [root, *more]
        self.write("proc/self/mountinfo", "".join(f"{25 + n} 1 {line}\n" for n, line in enumerate(lines)))

    def mount(self, kind: str, source: str = "x", options: str = "rw") -> Path:
        """A place of its own file system, for the tests to put things on."""
        place = self.place / "mounted place"
        place.mkdir(exist_ok=True)
        escaped = str(place).replace(" ", "\\040")
        self.mounts(f"0:50 / {escaped} {options},relatime shared:1 - {kind} {source} {options}")
        return place

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def smi(self, *rows: str) -> None:
        self.script(self.place / "bin/nvidia-smi", "\n".join(f"echo '{row}'" for row in rows))

    def no_gpu(self, driver: bool = False) -> None:
        (self.place / "bin/nvidia-smi").unlink()
        if not driver:
            (self.root / "proc/driver/nvidia/version").unlink()
            (self.root / "dev/nvidiactl").unlink()

    def install(self, name: str, version: str, more: str = "") -> None:
        folder = self.site / f"{re.sub('[-.]+', '_', name).lower()}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{more}\n")

    def remove(self, name: str) -> None:
        for folder in self.site.glob(f"{name}-*.dist-info"):
            (folder / "METADATA").unlink()
            folder.rmdir()

    def torch(self, version: str, cuda: str | None) -> None:
        (self.site / "torch").mkdir(exist_ok=True)
        lines = f"from typing import Optional\n__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\nhip = None\n"
        (self.site / "torch/version.py").write_text(lines)

    def libraries(self) -> None:
        pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        for name, version in pins:
            self.install(name, version)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extra = [f'{need}; extra == "dev"' for need in project["optional-dependencies"]["dev"]]
        wanted = "".join(f"Requires-Dist: {need}\n" for need in [*project["dependencies"], *extra])
        self.install("fp8-pipeline", "0.1.0", f"Requires-Python: {project['requires-python']}\n{wanted}")
        self.torch("2.13.0+cu130", "13.0")

    def findings(self, wanted: recipe.Recipe | None = None, measure: bool = False) -> list[Finding]:
        return doctor.examine(wanted, self.root, self.environment, measure, [str(self.site)])

    def bad(self, wanted: recipe.Recipe | None = None) -> list[Finding]:
        """All but what is in order."""
        return [finding for finding in self.findings(wanted) if finding.status != "ok"]

    def only(self, wanted: recipe.Recipe | None = None, *, area: str | None = None) -> Finding:
        """The one finding that is not in order."""
        found = [finding for finding in self.bad(wanted) if area is None or finding.area == area]
        assert len(found) == 1, found
        return found[0]


def says(finding: Finding, status: str, *words: str, remedy: str | None = None) -> None:
    assert finding.status == status, finding
    for word in words:
        assert word in finding.text, (word, finding.text)
    if remedy is not None:
        assert finding.remedy is not None and remedy in finding.remedy, finding
