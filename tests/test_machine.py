"""What is read of a machine, and what fits where. A tree of files stands for one; some tests read this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.calibration import placement as machine
from pipeline.calibration.placement import Device, Needs, choose_device, choose_place, limit_device
from pipeline.errors import PipelineError, UsageError
from pipeline.machine.drives import drive_space, existing
from pipeline.machine.gpus import free_gpu_memory, gpu_memory, visible_gpus
from pipeline.machine.memory import available_memory, total_memory
from pipeline.machine.processes import oom_kills, open_files
from pipeline.machine.system import System, control_groups, default_threads, processors
from tests.conftest import QUANTIZE, ROOT, make_plain_checkpoint

GB = 10**9
CPU = Device("cpu", "cpu AVX512", "", 100 * GB)
GPU = Device("cuda", "NVIDIA H200", "", 16 * GB)
NEEDS = Needs(layer=GB, made=GB // 2, hidden=GB, activations=GB)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(machine, "available_memory", lambda: 64 * GB)
    return monkeypatch


def test_what_fits_on_the_gpu_stays_there(memory: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_place("auto", GPU, NEEDS, tmp_path) == ("device", "1,000 MB of hidden states on the GPU")
    big = Needs(GB, GB // 2, 20 * GB, GB)
    assert choose_place("auto", GPU, big, tmp_path)[0] == "host"
    assert "pinned host memory" in choose_place("auto", GPU, big, tmp_path)[1]


def test_a_file_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 4 * GB)
    place, why = choose_place("auto", CPU, NEEDS, tmp_path / "not" / "there")
    assert place == "file" and "4.0 GB of memory are too few" in why and str(tmp_path) in why
    assert choose_place("file", CPU, NEEDS, tmp_path)[1].endswith("(asked for)")


def test_what_cannot_be(memory: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no GPU in this run"):
        choose_place("device", CPU, NEEDS, tmp_path)
    with pytest.raises(PipelineError, match=r"NVIDIA H200: a layer needs 11.* GB of device memory, 8.0 GB are free"):
        choose_place("auto", Device("cuda", "NVIDIA H200", "", 8 * GB), Needs(4 * GB, 2 * GB, GB, GB), tmp_path)
    with pytest.raises(PipelineError, match=r"GB free, 1000000.0 GB needed for hidden states"):
        choose_place("file", CPU, Needs(GB, GB, 10**15, GB), tmp_path)


def test_this_machine_has_memory() -> None:
    assert 10**8 < available_memory() < 1 << 50


# --- a tree of files ---------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, Any], **environment: str) -> System:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return System.here(root, environment, [])


MEMINFO = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: {2 << 20} kB\nMemAvailable: {60 << 20} kB"}
UNIT = "system.slice/night.service"  # as systemd-run --unit night -p MemoryMax=8G makes it
GIB = 1 << 30


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_nested_control_group(tmp_path: Path, version: int) -> None:
    """A systemd unit with MemoryMax: the process's own group has a limit, the root group has none."""
    if version == 2:
        group, limit, used, cached = f"sys/fs/cgroup/{UNIT}", "memory.max", "memory.current", "inactive_file"
        own, none = f"0::/{UNIT}", {"sys/fs/cgroup/system.slice/memory.max": "max"}
    else:
        group, limit, used = f"sys/fs/cgroup/memory/{UNIT}", "memory.limit_in_bytes", "memory.usage_in_bytes"
        own, cached = f"5:cpu,cpuacct:/\n4:memory:/{UNIT}\n0::/", "inactive_file 1\ntotal_inactive_file"
        none = {f"sys/fs/cgroup/memory/{limit}": (1 << 63) - 4096}
    files = {"proc/self/cgroup": own, f"{group}/{limit}": 8 * GIB, f"{group}/{used}": 5 * GIB}
    system = tree(tmp_path, {**MEMINFO, **none, **files, f"{group}/memory.stat": f"anon 7\n{cached} {2 * GIB}"})
    assert (available_memory(system), total_memory(system)) == (5 * GIB, 8 * GIB)


def test_each_limit_around_a_process_holds(tmp_path: Path) -> None:
    """The unit's own limit is smaller, its slice has less room: others are in it."""
    slice_, unit = "sys/fs/cgroup/system.slice", f"sys/fs/cgroup/{UNIT}"
    files = {f"{slice_}/memory.max": 40 * GIB, f"{slice_}/memory.current": 39 * GIB,
             f"{unit}/memory.high": 8 * GIB, f"{unit}/memory.max": "max", f"{unit}/memory.current": GIB}  # fmt: skip
    system = tree(tmp_path, {**MEMINFO, "proc/self/cgroup": f"0::/{UNIT}", **files})
    assert (available_memory(system), total_memory(system)) == (GIB, 8 * GIB)
    (tmp_path / f"{slice_}/memory.current").write_text(str(41 * GIB))  # a limit may be set below what is used
    assert available_memory(system) == 0
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/../../elsewhere")  # as a cgroup namespace shows it
    assert all(group.is_relative_to("sys/fs/cgroup") for group in control_groups(system, "memory"))
    assert total_memory(system) == 64 * GIB


def test_memory_without_limits(tmp_path: Path) -> None:
    system = tree(tmp_path, MEMINFO)
    assert (available_memory(system), total_memory(system)) == (60 * GIB, 64 * GIB)
    old = tree(tmp_path / "old", {"proc/meminfo": "MemTotal: 4096 kB\nMemFree: 1024 kB"})
    assert available_memory(old) == 1 << 20
    assert total_memory(tree(tmp_path / "none", {})) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def nested_group() -> Iterator[Path]:
    """A real control group without a limit in one that has 300 MB."""
    top, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not top.is_dir():
        top, limit = Path("/sys/fs/cgroup"), "memory.max"
    outer = top / f"fp8-test-nested-{os.getpid()}"
    inner = outer / "unit"
    try:
        inner.mkdir(parents=True)
        (outer / limit).write_text(str(300 << 20))
        yield inner
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    finally:
        for group in (inner, outer):
            if group.exists():
                group.rmdir()


def test_placement_sees_a_real_nested_limit(nested_group: Path, tmp_path: Path) -> None:
    """Placement in a process below the limit: 1 GB of the activation cache goes to a file."""
    script = f"""
from pathlib import Path
from pipeline.calibration.placement import Device, Needs, choose_place
from pipeline.machine.memory import available_memory, total_memory
cpu = Device("cpu", "cpu", "", 10**9)
print(total_memory(), available_memory(), choose_place("auto", cpu, Needs(0, 0, 10**9, 0), Path({str(tmp_path)!r}))[0])
"""
    enter = f'echo $$ > {nested_group}/cgroup.procs && exec "$0" -c "$1"'
    done = subprocess.run(["bash", "-c", enter, sys.executable, script], capture_output=True, text=True, cwd=ROOT)
    if "cgroup.procs" in done.stderr:
        pytest.skip(f"no process can be put into a control group here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    total, available, place = done.stdout.split()
    assert int(total) == 300 << 20 and 0 < int(available) < 300 << 20 and place == "file"


@pytest.mark.parametrize("version", [1, 2])
def test_oom_kills_of_a_nested_control_group(tmp_path: Path, version: int) -> None:
    """Where the machine's own count cannot be read, the group's and those above it tell of a kill."""
    name = "memory.events" if version == 2 else "memory.oom_control"
    top = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    own = f"0::/{UNIT}" if version == 2 else f"4:memory:/{UNIT}"
    events = "low 0\noom 5\noom_kill {}\noom_group_kill 7"
    files = {"proc/self/cgroup": own, f"{top}/{UNIT}/{name}": events.format(0)}
    system = tree(tmp_path, files)
    assert oom_kills(system) == 0
    tree(tmp_path, {f"{top}/{UNIT}/{name}": events.format(2)})
    assert oom_kills(system) == 2
    tree(tmp_path, {f"{top}/system.slice/{name}": events.format(3), "proc/vmstat": "nr_free_pages 9\noom_kill 4"})
    assert oom_kills(system) == 2 + 3 + 4


def test_open_files(tmp_path: Path) -> None:
    text = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024  524288  files"
    assert open_files(tree(tmp_path, {"proc/self/limits": text})) == (1024, 524288)
    assert open_files(tree(tmp_path / "none", {})) is None
    soft, hard = open_files() or (0, 0)
    assert 0 < soft <= hard


# --- GPUs --------------------------------------------------------------------------------------------

ROWS = (
    "0, GPU-aaaa, NVIDIA H100, 580.95.05, 9.0, 81559, 1000",
    "1, GPU-abbb, NVIDIA H100, 580.95.05, 9.0, 81559, 70000",
    "2, GPU-cccc, NVIDIA L4, 580.95.05, 8.9, 23034, 22000",
)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that tells of three GPUs, whatever CUDA_VISIBLE_DEVICES says, as the real one."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in ROWS))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


@pytest.mark.parametrize(
    ("wanted", "names", "smallest", "free"),
    [
        (None, ["0", "1", "2"], 23034, 1000),
        ("1", ["1"], 81559, 70000),  # the second job of a batch
        ("2,0", ["2", "0"], 23034, 22000),
        ("GPU-ab", ["GPU-ab"], 81559, 70000),
        ("GPU-a", [], 0, None),  # the beginning of two
        ("1,7,0", ["1"], 81559, 70000),  # what follows an unknown one is hidden too
        ("1,-1,0", ["1"], 81559, 70000),
        ("1,1", ["1"], 81559, 70000),
        ("", [], 0, None),
        ("-1", [], 0, None),
        ("MIG-1111,MIG-2222", ["MIG-1111", "MIG-2222"], 0, None),  # nvidia-smi tells of the whole GPU
    ],
)
def test_gpus_of_this_process(
    smi: Path, monkeypatch: pytest.MonkeyPatch, wanted: str | None, names: list[str], smallest: int, free: int | None
) -> None:
    if wanted is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert visible_gpus() == names
    assert gpu_memory() == smallest << 20
    assert free_gpu_memory() == (None if free is None else free << 20)


@pytest.mark.parametrize("script", [None, "echo 'Failed to initialize NVML'; exit 18", "echo 'No devices were found'"])
def test_no_gpus(smi: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    if script is None:
        smi.unlink()
        monkeypatch.setenv("PATH", str(smi.parent))
    else:
        smi.write_text(f"#!/bin/sh\n{script}\n")
    assert (visible_gpus(), gpu_memory(), free_gpu_memory()) == ([], 0, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 4")  # nvidia-smi is not everywhere where CUDA is
    assert (visible_gpus(), gpu_memory(), free_gpu_memory()) == (["3", "4"], 0, None)


def test_planning_limits_nothing_and_the_run_does() -> None:
    """`runtime.device_memory` is enforced from the run's start on; choosing a device only looks."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    try:
        device = choose_device("cuda", limit=GB)
        assert device.limit == GB and device.free <= GB
        torch.empty(2 * GB, dtype=torch.uint8, device="cuda")
        torch.cuda.empty_cache()
        limit_device(device)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * GB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- processors --------------------------------------------------------------------------------------


def cores(count: int, siblings: int = 2) -> dict[str, Any]:
    """A socket with logical CPUs 0, 1, 2, …: the siblings of a core are neighbours."""
    files: dict[str, Any] = {}
    for cpu in range(count * siblings):
        place = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files |= {f"{place}/core_id": cpu // siblings, f"{place}/physical_package_id": 0}
    return files


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 8),  # of 16 cores
        ({"proc/self/status": "Cpus_allowed_list:\t0-9"}, 5),
        ({"proc/self/cgroup": f"0::/{UNIT}", f"sys/fs/cgroup/{UNIT}/cpu.max": "350000 100000"}, 3),
        ({"proc/self/cgroup": f"0::/{UNIT}", "sys/fs/cgroup/system.slice/cpu.max": "50000 100000"}, 1),
    ],
)
def test_threads_follow_affinity_and_quota(tmp_path: Path, files: dict[str, Any], threads: int) -> None:
    assert default_threads(tree(tmp_path, {**cores(16), **files})) == threads


def test_processors_that_do_not_say_their_core(tmp_path: Path) -> None:
    """Some virtual machines give -1 for each."""
    files = {f"sys/devices/system/cpu/cpu{cpu}/topology/core_id": -1 for cpu in range(6)}
    assert processors(tree(tmp_path, files)).cores == 6
    assert processors(tree(tmp_path / "none", {})).online == (os.cpu_count() or 1)


def test_a_plan_computes_with_the_cores_that_it_may_use(tmp_path: Path, write_recipe: Any) -> None:
    """The real affinity of a process, of one CPU, against the plan's number of threads."""
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))

    def planned(cpus: set[int]) -> int:
        done = subprocess.run(
            [*QUANTIZE, "plan", str(recipe), "--json"], capture_output=True, text=True, check=True, cwd=tmp_path,
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )  # fmt: skip
        return int(json.loads(done.stdout)["threads"])

    allowed = os.sched_getaffinity(0)
    assert planned({min(allowed)}) == 1
    assert planned(allowed) == default_threads() <= len(allowed)


# --- drives ------------------------------------------------------------------------------------------


def test_room_where_something_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = drive_space(tmp_path / "not" / "there")
    assert space.directory == tmp_path and 0 < space.free <= space.total
    assert existing(tmp_path) == tmp_path and existing(Path("/not/there")) == Path("/")
    monkeypatch.chdir(tmp_path)
    assert existing(Path("not/there")) == tmp_path
