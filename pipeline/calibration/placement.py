"""Where layers run and where the activation cache lies, chosen by what fits, and said. Choosing changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import DiskFull, OutOfMemory, UsageError
from pipeline.machine.drives import drive_space
from pipeline.machine.memory import available_memory

Place = Literal["device", "host", "file"]
BF16 = 2
DEVICE_BASE = 700 << 20  # CUDA's context and cuBLAS' workspaces, seen on an H200
SHARE = 0.8  # of what is free, so that the machine keeps breathing


@dataclass(frozen=True)
class Device:
    """What computes.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: of the processor; with the kind it decides bits, so it is part of a run's identity.
        why: a sentence for the user.
        free: bytes of its memory that may be used; for a CPU the host's.
        limit: bytes of a GPU's memory that this process may take, at most; see `limit_device`.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    why: str
    free: int
    limit: int | None = None


@dataclass(frozen=True)
class Needs:
    """What layerwise calibration holds at once, in bytes.

    Attributes:
        layer: the largest layer as it is read.
        made: what it becomes.
        hidden: the hidden states of all batches.
        activations: the temporary tensors of one forward.
    """

    layer: int
    made: int
    hidden: int
    activations: int

    @property
    def compute(self) -> int:
        """On the device, beside hidden states: the layer, what it becomes, and a forward's tensors."""
        return 2 * self.layer + self.made + self.activations


def import_libraries(more: Callable[[], None] | None = None) -> float:
    """Import torch and transformers, and what `more` imports; returns the seconds, which are reported apart."""
    begin = time.perf_counter()
    import accelerate  # noqa: F401
    import torch  # noqa: F401
    import transformers.core_model_loading  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    if more is not None:
        more()
    return time.perf_counter() - begin


def choose_device(wanted: str, limit: int | None = None) -> Device:
    """The device of a recipe's ``runtime.device``. Only looks; what the device may take is set by `limit_device`.

    A GPU's free memory is torch's own reading and not nvidia-smi's: torch numbers GPUs in an order of its own, and
    knows a MIG slice's memory.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda``.
        limit: bytes of the GPU's memory that this process may take, at most.

    Raises:
        UsageError: cuda is asked for and torch finds none.
    """
    import torch

    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        built = torch.version.cuda
        reason = f"torch {torch.__version__} is a CPU build" if built is None else "torch finds no GPU or driver"
        raise UsageError(f"runtime.device: cuda: {reason}", remedy="use device: cpu, or auto")
    if wanted in ("auto", "cuda") and usable:
        index = torch.cuda.current_device()
        free, total = torch.cuda.mem_get_info(index)
        if limit is not None:
            free = min(free, limit)
        name = torch.cuda.get_device_name(index)
        why = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free" + (
            "" if wanted == "cuda" else " (auto: a GPU is here)"
        )
        return Device("cuda", name, why, free, limit)
    capability = torch.backends.cpu.get_cpu_capability()
    reason = "asked for" if wanted == "cpu" else "auto: torch finds no GPU"
    return Device("cpu", f"cpu {capability}", f"CPU with {capability} ({reason})", available_memory())


def limit_device(device: Device) -> None:
    """Let torch take no more of a GPU's memory than `Device.limit` in this process. Called where the run starts."""
    if device.kind == "cuda" and device.limit is not None:
        import torch

        index = torch.cuda.current_device()
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, device.limit / total), index)


def choose_place(wanted: str, device: Device, needs: Needs, work: Path) -> tuple[Place, str]:
    """Where hidden states wait between two layers.

    Args:
        wanted: the recipe's ``runtime.hidden_states``.
        device: what computes.
        needs: what has to fit.
        work: the directory of a file.

    Returns:
        The place, and a sentence about it.

    Raises:
        UsageError: what is asked for does not exist, as ``device`` on a CPU.
        OutOfMemory: not even one layer fits.
        DiskFull: the disk is too small for a file.
    """
    size = f"{needs.hidden / 1e6:,.0f} MB"
    if wanted == "device" and device.kind == "cpu":
        raise UsageError("runtime.hidden_states: device: there is no GPU in this run", remedy="use host, file or auto")
    host = available_memory()
    if device.kind == "cuda":
        room = int(device.free * SHARE) - DEVICE_BASE - needs.compute
        if room < 0:
            raise OutOfMemory(
                f"{device.name}: a layer needs {(needs.compute + DEVICE_BASE) / 1e9:.1f} GB of device memory, "
                f"{device.free / 1e9:.1f} GB are free",
                remedy="free some, or use runtime.device: cpu",
            )
        if wanted == "device" or (wanted == "auto" and needs.hidden <= room):
            return "device", f"{size} of hidden states on the GPU"
    host_needs = needs.layer * 2 + needs.made + (needs.activations if device.kind == "cpu" else 0)
    if wanted == "host" or (wanted == "auto" and needs.hidden + host_needs <= int(host * SHARE)):
        kind = "pinned host memory" if device.kind == "cuda" else "memory"
        return "host", f"{size} of hidden states in {kind}"
    space = drive_space(work)
    if space.free < needs.hidden:
        raise DiskFull(
            f"{space.directory}: {space.free / 1e9:.1f} GB free, {needs.hidden / 1e9:.1f} GB needed for hidden states",
            remedy="free some, set runtime.work_directory, or lower calibration.samples",
        )
    why = "asked for" if wanted == "file" else f"{host / 1e9:.1f} GB of memory are too few"
    return "file", f"{size} of hidden states in a file in {space.directory} ({why})"
