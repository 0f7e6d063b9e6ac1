"""The GPUs of this machine, asked of nvidia-smi: neither CUDA nor torch is imported."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.machine.system import System

WSL_TOOLS = "usr/lib/wsl/lib"  # where Windows puts its nvidia-smi; not on every PATH
SMI_FIELDS = ("index", "uuid", "name", "driver_version", "compute_cap", "memory.total", "memory.free")
SMI_SECONDS = 30  # a GPU without persistence mode wakes slowly


@dataclass(frozen=True)
class GPU:
    """As nvidia-smi tells it; None for what it does not know."""

    index: int
    uuid: str
    name: str
    driver: str
    capability: tuple[int, int] | None
    total: int | None
    free: int | None


@dataclass(frozen=True)
class GPUs:
    """What was found, and what was in the way.

    Attributes:
        found: in nvidia-smi's order.
        tool: nvidia-smi, None where there is none.
        problem: its complaint.
        driver: the kernel module's version, as /proc says; empty without one.
    """

    found: tuple[GPU, ...]
    tool: Path | None
    problem: str | None
    driver: str


def gpus(system: System) -> GPUs:
    """Ask nvidia-smi, which needs no CUDA and no torch."""
    driver = re.search(r"^NVRM version:.*?\s(\d+\.\d[\d.]*)\s", system.text("proc/driver/nvidia/version"), re.MULTILINE)
    version = driver[1] if driver else ""
    paths = [Path(p) for p in system.environment.get("PATH", os.defpath).split(os.pathsep) if p]
    tools = [place / "nvidia-smi" for place in (*paths, system.root / WSL_TOOLS)]
    tool = next((place for place in tools if place.is_file() and os.access(place, os.X_OK)), None)
    if tool is None:
        return GPUs((), None, None, version)
    status, said = _ask(system, tool, SMI_FIELDS)
    fields: Sequence[str] = SMI_FIELDS
    if status and "compute_cap" in said:  # drivers before 470 know no such field
        fields = tuple(name for name in SMI_FIELDS if name != "compute_cap")
        status, said = _ask(system, tool, fields)
    lines = [line for line in said.splitlines() if line.strip()]
    if status:
        return GPUs((), tool, lines[0].strip() if lines else f"it ended with status {status}", version)
    found = [_gpu(dict(zip(fields, map(str.strip, line.split(",")), strict=False))) for line in lines]
    return GPUs(tuple(gpu for gpu in found if gpu is not None), tool, None, version)


def _ask(system: System, tool: Path, fields: Sequence[str]) -> tuple[int, str]:
    command = [str(tool), f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, env=dict(system.environment)
        )
    except subprocess.TimeoutExpired:
        return 1, f"it did not answer within {SMI_SECONDS} s"
    except OSError as error:
        return 1, f"it cannot be run: {error.strerror}"
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _gpu(row: Mapping[str, str]) -> GPU | None:
    if not row["index"].isdigit():
        return None

    def mebibytes(name: str) -> int | None:  # "[N/A]" where the GPU shares the host's memory
        return int(row[name]) << 20 if row.get(name, "").isdigit() else None

    match = re.fullmatch(r"(\d+)\.(\d+)", row.get("compute_cap", ""))
    capability = (int(match[1]), int(match[2])) if match else None
    total, free = mebibytes("memory.total"), mebibytes("memory.free")
    return GPU(int(row["index"]), row["uuid"], row["name"], row["driver_version"], capability, total, free)


def visible(found: Sequence[GPU], wanted: str | None) -> tuple[GPU, ...]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order: numbers or UUIDs' beginnings, up to the first that is neither."""
    if wanted is None:
        return tuple(found)
    chosen: list[GPU] = []
    for word in (part.strip() for part in wanted.split(",")):
        match = [g for g in found if (word == str(g.index)) or (word.startswith("GPU-") and g.uuid.startswith(word))]
        if len(match) != 1 or match[0] in chosen:
            break
        chosen.append(match[0])
    return tuple(chosen)


def visible_gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them, without importing torch."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word.strip() for word in named.split(",") if word.strip() and word.strip() != "-1"]
    return [line for line in _nvidia_smi("index") if line.isdigit()]


def gpu_memory() -> int:
    """Bytes of the smallest GPU's memory; 0 where there is none."""
    found = [int(line) for line in _nvidia_smi("memory.total") if line.isdigit()]  # MiB
    return min(found, default=0) << 20


def _nvidia_smi(field: str) -> list[str]:
    try:
        asked = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if not done.returncode else []


def free_gpu_memory() -> int | None:
    """Free bytes of the GPU that this process uses; None where nvidia-smi does not say."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        return int(done.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
