"""Jobs on this machine: what fits beside what, how jobs end, and how far they are. Whole jobs: test_executors.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.executor import Local, result_of, share_gpu
from pipeline.batch.job import JobRequest, JobResult
from pipeline.batch.progress import Follower
from pipeline.machine.processes import oom_kills
from tests.batch_runs import a_plan
from tests.conftest import RECIPE


def test_a_shared_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two on a GPU of 80 GiB take half of it each, or what the recipe allows if that is less."""

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0, GPU-aaaa, NVIDIA A100, 580.95.05, 8.0, 81920, 81000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = RECIPE.format(source="s", output="o")
    request = JobRequest("j", text)
    assert share_gpu(request, 1) == request
    assert share_gpu(request, 2).overrides == ("runtime.device_memory=42949MB",)
    own = JobRequest("j", text + "runtime: {device_memory: 10GB}\n")
    assert share_gpu(own, 2) == own
    assert share_gpu(JobRequest("j", text + "runtime: {device_memory: 60GB}\n"), 2).overrides[-1].endswith("=42949MB")


def test_two_large_ones_never_fill_the_disk_together(tmp_path: Path) -> None:
    """What a running job has yet to write is not free for another, although the drive says so."""

    free = shutil.disk_usage(tmp_path).free
    large = a_plan(tmp_path / "a", disk=int(free * 0.6), peak_memory=1)
    other = a_plan(tmp_path / "b", disk=large.disk, peak_memory=1)
    small = a_plan(tmp_path / "c", disk=10**6, peak_memory=1)
    here = Local()
    assert here._fits(large, ()) and here._fits(small, [large])
    assert not here._fits(other, [large])
    assert not here._fits(replace(large, disk=free), ())
    work = a_plan(tmp_path / "c", work=tmp_path / "work", disk=10**6, scratch=int(free * 0.6))
    assert here._fits(work, ()) and not here._fits(work, [large]), "scratch files need room, too"
    here.downloading = (tmp_path, int(free * 0.6))
    assert not here._fits(large, ()) and here._fits(small, ()), "and so does a download"
    assert not Local().has_room(tmp_path, free)


def test_slots() -> None:
    """One job a GPU, spread; those that need none do not take one."""
    from types import SimpleNamespace

    two = Local(gpus=("0", "3"), per_gpu=2, others=1)
    wants = a_plan(gpu=True)
    taken = []
    for number in range(4):
        gpu = two._slot(wants)
        assert gpu is not None
        taken.append(gpu)
        two._running[str(number)] = SimpleNamespace(gpu=gpu)  # type: ignore[assignment]
    assert taken == ["0", "3", "0", "3"] and two._slot(wants) is None
    assert two._slot(a_plan()) == ""
    assert Local()._slot(wants) == "", "without a GPU it runs on the CPU"


def test_what_ran_out_of_memory() -> None:
    """However a library says it; a fault of the device is another matter."""
    from pipeline.errors import OutOfMemory, from_os_error, is_device_fault, is_out_of_memory

    for text in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
                 "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"):  # fmt: skip
        assert is_out_of_memory(RuntimeError(text)) and not is_device_fault(RuntimeError(text))
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_device_fault(fault) and not is_out_of_memory(fault)
    assert not is_device_fault(RuntimeError("shapes differ")) and is_out_of_memory(MemoryError())
    assert isinstance(from_os_error(OSError(errno.ENOMEM, "no"), "x"), OutOfMemory)


def test_results_of_processes(tmp_path: Path) -> None:
    assert result_of(-9, tmp_path, False).kind == "killed"
    assert result_of(-9, tmp_path, True).kind == "out of memory"
    assert result_of(-11, tmp_path, True).kind == "killed" and "SIGSEGV" in result_of(-11, tmp_path, False).reason
    assert result_of(3, tmp_path, False).kind == "crashed"
    assert result_of(errno.ENOSPC, tmp_path, False).kind == "disk", "its ending had no room either"
    (tmp_path / "ending.json").write_text(json.dumps(asdict(JobResult("disk", 1, "full"))))
    assert result_of(1, tmp_path, False).kind == "disk"


def test_the_kernels_oom_kills_are_counted(tmp_path: Path) -> None:
    """A real one, in a control group of its own."""
    group = Path("/sys/fs/cgroup/memory/fp8-test")
    limit = "memory.limit_in_bytes"
    if not Path("/sys/fs/cgroup/memory").is_dir():
        group, limit = Path("/sys/fs/cgroup/fp8-test"), "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(30 << 20))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        before = oom_kills()
        eat = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c 'bytearray(200 << 20)'"
        process = subprocess.run(["bash", "-c", eat], capture_output=True)
        if oom_kills() == before and process.returncode != -9:
            pytest.skip("this kernel does not enforce the group's limit")
        assert process.returncode == -9 and oom_kills() > before
        assert result_of(process.returncode, tmp_path, oom_kills() > before).kind == "out of memory"
    finally:
        group.rmdir()


def test_progress_follows_a_record(tmp_path: Path) -> None:
    """Torn lines wait for their rest; earlier attempts count as done, not as speed."""
    path = tmp_path / "out.partial" / "quantize" / "events.jsonl"
    path.parent.mkdir(parents=True)
    follower = Follower(tmp_path / "out", 1000, since=100.0)
    assert follower.now().stage == "starting"

    def write(text: str) -> None:
        with path.open("a") as file:
            file.write(text)

    def event(moment: float, name: str, **more: Any) -> str:
        return json.dumps({"time": moment, "event": name, **more}) + "\n"

    write(event(50, "run", done=0) + event(51, "piece", label="visual", bytes_read=300, rss_bytes=5))
    write(event(120, "run", done=1) + event(121, "imports"))
    now = follower.now()
    assert (now.stage, now.share, now.rate) == ("layers", 0.3, 0.0) and now.left is None
    layer = event(time.time(), "layer", label="model.layers.0", index=0, bytes_read=350, rss_bytes=7, device_bytes=9)
    write(layer[:20])
    assert follower.now().share == 0.3
    write(layer[20:])
    now = follower.now()
    assert (now.at, now.share, now.device_bytes, now.rss) == ("model.layers.0", 0.65, 9, 7) and now.rate > 0
    assert now.left is not None and now.left > 0
    write(event(time.time(), "sealed"))
    assert follower.now().stage == "verifying"
