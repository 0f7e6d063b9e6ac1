"""The doctor on memory, processors, WSL and drives."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import drives
from pipeline.machine.drives import Rate
from tests.conftest import ROOT, make_plain_checkpoint, write_shard
from tests.machines import GIB, WSL2, Machine, says

# --- memory ------------------------------------------------------------------------------------------


def test_too_little_memory(machine: Machine, recipe_of: Any) -> None:
    machine.memory(total=64 * GIB, free=50 << 20)
    says(
        machine.only(recipe_of()),
        "warning",
        "52.4 MB of 68.7 GB free",
        "the run needs up to",
        remedy="end other programs",
    )
    machine.memory(total=60 << 20, free=50 << 20)
    says(
        machine.only(recipe_of()),
        "unfit",
        "the run needs up to",
        remedy="use a larger machine, or lower runtime.threads",
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_memory(machine: Machine, recipe_of: Any, version: int) -> None:
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
    found = machine.only(recipe_of())
    says(
        found, "unfit", "41.9 MB free of 62.9 MB, a limit of the container", remedy="raise the container's memory limit"
    )
    machine.write("proc/version", WSL2)
    says(machine.only(recipe_of(), area="memory"), "unfit", remedy=".wslconfig")


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
def test_a_quota(machine: Machine, recipe_of: Any, version: int) -> None:
    if version == 2:
        machine.write("sys/fs/cgroup/user.slice/cpu.max", "350000 100000\n")
    else:
        machine.write("proc/self/cgroup", "3:cpu,cpuacct:/docker/abc\n")
        machine.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "350000\n")
        machine.write("sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n")
    says(machine.only(), "warning", "OMP_NUM_THREADS=8, with a quota of 3.5 CPU(s)", remedy="export OMP_NUM_THREADS=3")
    assert any(finding.text == "a run computes with 3 thread(s)" for finding in machine.findings())
    machine.environment["OMP_NUM_THREADS"] = "3"
    wanted = recipe_of("runtime.threads=8")
    says(machine.only(wanted), "warning", "8, 3.5 CPU(s) may be used", remedy="runtime.threads=3")
    assert machine.bad() == [] and machine.bad(recipe_of("runtime.threads=3")) == []


def test_affinity(machine: Machine, recipe_of: Any) -> None:
    machine.write("proc/self/status", "Cpus_allowed_list:\t0-3,8\n")
    cores = next(finding for finding in machine.findings() if finding.area == "cores")
    assert cores.text == "3 physical core(s), 5 logical, of 16 of the machine that this process may use"
    says(machine.only(), "warning", "OMP_NUM_THREADS=8, with 3 physical core(s)", remedy="OMP_NUM_THREADS=3")
    assert any(finding.text == "a run computes with 3 thread(s)" for finding in machine.findings())
    machine.environment["OMP_NUM_THREADS"] = "3"
    says(machine.only(recipe_of("runtime.threads=8")), "warning", "threads: 8, 5 CPU(s)", remedy="runtime.threads=3")


def test_threads_of_a_recipe(machine: Machine, recipe_of: Any) -> None:
    says(machine.only(recipe_of("runtime.threads=12")), "note", "12, on 8 physical core(s)", remedy="runtime.threads=8")
    says(machine.only(recipe_of("runtime.threads=20")), "warning", "runtime.threads: 20, 16 CPU(s)", remedy="threads=8")


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


def test_open_files(machine: Machine, recipe_of: Any) -> None:
    machine.write("proc/self/limits", "Max open files            60  4096  files\n")
    says(machine.only(recipe_of()), "warning", "at most 60 open files, about 67 are needed", remedy="ulimit -n 1024")
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


def test_a_windows_drive(machine: Machine, recipe_of: Any) -> None:
    place = machine.mount("9p", "C:\\134", "rw,aname=drvfs;path=C:\\134")
    machine.write("proc/version", WSL2)
    says(
        machine.only(recipe_of(output=place / "out"), area="output"),
        "warning",
        "a Windows drive",
        remedy="WSL's own ext4",
    )
    source = make_plain_checkpoint(place / "source")
    says(
        machine.only(recipe_of(source=source), area="source"),
        "warning",
        "a Windows drive",
        remedy="model.source on WSL's",
    )


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
def test_a_poor_place_for_the_output(machine: Machine, recipe_of: Any, kind: str, words: str, remedy: str) -> None:
    place = machine.mount(kind)
    says(machine.only(recipe_of(output=place / "deeper" / "out")), "warning", str(place), words, remedy=remedy)


@pytest.mark.parametrize(
    ("kind", "status"), [("nfs4", "note"), ("fuse.s3fs", "note"), ("tmpfs", "ok"), ("overlay", "ok")]
)
def test_where_the_source_may_lie(machine: Machine, recipe_of: Any, kind: str, status: str) -> None:
    place = machine.mount(kind)
    found = machine.findings(recipe_of(source=make_plain_checkpoint(place / "source")))
    source = [finding for finding in found if finding.area == "source"]
    assert [finding.status for finding in source] == [status]
    assert (status == "ok") == (source[0].remedy is None)
    assert [finding for finding in found if finding.area != "source" and finding.status != "ok"] == []


def test_where_the_cache_lies(machine: Machine) -> None:
    machine.environment["HF_HOME"] = str(machine.mount("nfs"))
    says(machine.only(), "note", "nfs", "mounted place/hub", remedy="local drive (ext4, xfs) for HF_HOME")


def test_a_work_directory(machine: Machine, recipe_of: Any) -> None:
    place = machine.mount("tmpfs")
    found = machine.bad(recipe_of(f"runtime.work_directory={json.dumps(str(place))}"))
    says(next(finding for finding in found if finding.area == "work"), "warning", "in memory", remedy="work_directory")


def test_read_only(machine: Machine, recipe_of: Any) -> None:
    place = machine.mount("ext4", "/dev/sdb1", "ro")
    found = machine.findings(recipe_of(output=place / "out"))
    says(next(f for f in found if f.area == "output"), "unfit", "mounted read-only", remedy="choose another output")
    assert doctor.exit_status(found) == 1


def test_a_file_in_the_way(machine: Machine, recipe_of: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    says(
        machine.only(recipe_of(output=tmp_path / "file/out")), "unfit", "file is no directory", remedy="another output"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(machine: Machine, recipe_of: Any, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    says(machine.only(recipe_of(output=tmp_path / "theirs/out")), "unfit", "may not be written by this user")


def test_an_unknown_mount(machine: Machine) -> None:
    machine.write("proc/self/mountinfo", "")
    assert {finding.status for finding in machine.bad()} == {"note"}
    assert all("does not say what it lies on" in finding.text for finding in machine.bad())


def test_a_spinning_disk(machine: Machine, recipe_of: Any) -> None:
    machine.rotational("1")
    found = machine.bad(recipe_of())
    assert {finding.area for finding in found} == {"source", "cache", "output"}
    for finding in found:
        says(finding, "note", "a spinning disk", remedy="choose an SSD")
    machine.mounts(root="8:2 / / rw,relatime - ext4 /dev/vda2 rw")  # what a virtual disk says of itself means nothing
    assert machine.bad(recipe_of()) == []
    machine.mounts(root="0:30 / / rw,relatime - btrfs /dev/sdb1 rw")
    machine.write("sys/devices/pci0/block/sdb/queue/rotational", "1")
    machine.write("sys/devices/pci0/block/sdb/sdb1/partition", "1")
    machine.link("sys/class/block/sdb1", "../../devices/pci0/block/sdb/sdb1")
    assert {finding.area for finding in machine.bad(recipe_of())} == {"source", "cache", "output"}


def test_too_little_room(machine: Machine, recipe_of: Any, tmp_path: Path) -> None:
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
    says(machine.only(recipe_of(source=source)), "unfit", " free, ", " needed", remedy="or choose another output")


def test_measured_rates_as_sentences(tmp_path: Path) -> None:
    use = drives.Use("output", tmp_path, "output", True, reads=None, needs=10**10)
    fast, slow = Rate(2 * 10**9, 1.0), Rate(10**8, 1.0)
    says(drives.judge(use, fast, fast), "ok", "writes 2 GB/s (about 5 s for 10 GB), reads 2 GB/s, measured")
    says(
        drives.judge(use, slow, fast), "note", "writes 100 MB/s", "it sets the pace", remedy="a faster drive for output"
    )
    says(drives.judge(use, slow, slow, spinning=True), "note", "a spinning disk")
    says(drives.judge(use, fast, fast, spinning=True), "ok", "calls itself a spinning disk and is faster")


def test_measuring_leaves_nothing_behind(machine: Machine, recipe_of: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    before = sorted(path for path in tmp_path.rglob("*") if "machine" not in path.parts)
    found = machine.findings(recipe_of(source=source), measure=True)
    text = "\n".join(finding.text for finding in found if finding.area == "output")
    assert re.search(r"writes .*/s, reads .*/s, measured", text), text
    assert sorted(path for path in tmp_path.rglob("*") if "machine" not in path.parts) == before


def test_a_source_is_read_not_touched(machine: Machine, recipe_of: Any, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source", hidden=8, wide=8)
    shard = sorted(source.glob("*.safetensors"))[0]
    extra = {"visual.blob": {"dtype": "U8", "shape": [32 << 20], "data_offsets": [0, 32 << 20]}}
    write_shard(source / "model-00003-of-00003.safetensors", extra, b"\1" * (32 << 20))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["visual.blob"] = "model-00003-of-00003.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    before = shard.stat().st_mtime_ns, sorted(source.iterdir())
    found = [
        finding for finding in machine.findings(recipe_of(source=source), measure=True) if finding.area == "source"
    ]
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
