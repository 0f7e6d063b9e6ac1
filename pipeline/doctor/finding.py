"""One sentence about the machine, its code, its status and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "warning", "unfit"]

# Every code with what it means. Codes are stable: programs decide by them, while the sentence of a finding may change.
# How bad it is says the status, which may depend on the recipe.
_BY_AREA: dict[str, dict[str, str]] = {
    "GPU": {
        "gpu-fit": "There is a GPU, and its driver fits torch, where that is installed.",
        "gpu-not-used": "The recipe says runtime.device: cpu, so no GPU is looked at.",
        "gpu-not-needed": "There is no GPU, and this recipe needs none.",
        "gpu-missing": "There is no NVIDIA GPU and no driver.",
        "gpu-hidden": "CUDA_VISIBLE_DEVICES hides every GPU of the machine.",
        "gpu-order": "CUDA_VISIBLE_DEVICES counts GPUs in another order than nvidia-smi.",
        "gpu-several": "There are several GPUs, and a run uses one of them.",
        "gpu-driver-failing": "nvidia-smi fails: driver and kernel module do not work together.",
        "gpu-not-in-container": "The host has NVIDIA's driver, but this container was started without a GPU.",
        "gpu-tools-missing": "NVIDIA's driver is loaded, but nvidia-smi is not on the PATH or finds no GPU.",
        "gpu-driver-old": "The driver is too old for the CUDA that torch was built for.",
        "gpu-too-old": "The GPU is too old for the CUDA that torch was built for.",
        "torch-without-cuda": "There is a GPU, but torch was built without CUDA.",
        "gpu-memory-fit": "The GPU has memory enough.",
        "gpu-memory-short": "One layer needs more GPU memory than is free or allowed.",
        "gpu-memory-unknown": "nvidia-smi does not tell how much memory the GPU has.",
        "gpu-busy": "Other programs hold more than half of the GPU's memory.",
    },
    "FP8 on this GPU": {
        "fp8-native": "The GPU computes in FP8.",
        "fp8-weights-only": "The GPU has no FP8 arithmetic: vLLM serves FP8 weights with arithmetic in BF16 here.",
        "fp8-unsupported": "The GPU has neither FP8 nor BF16: vLLM serves few FP8 checkpoints here, or none.",
        "fp8-unknown": "The driver does not tell the GPU's compute capability.",
    },
    "Memory, processors, limits, WSL": {
        "memory-fit": "There is memory enough.",
        "memory-short": "The run may need more memory than is free.",
        "memory-unknown": "How much memory there is cannot be read.",
        "memory-swapped": "Memory has been swapped out.",
        "cores-fit": "How many cores this process may use.",
        "threads-fit": "A run computes with no more threads than there are cores.",
        "threads-many": "A run computes with more threads than there are cores or CPUs for it.",
        "omp-fit": "OMP_NUM_THREADS is the number of cores.",
        "omp-unset": "OMP_NUM_THREADS is not set: libraries start more threads than there are cores.",
        "omp-invalid": "OMP_NUM_THREADS is no number of threads and is ignored.",
        "omp-many": "OMP_NUM_THREADS is more than the cores or the quota.",
        "omp-few": "OMP_NUM_THREADS is less than the cores.",
        "open-files-few": "A process may open fewer files than the run may need.",
        "wsl-1": "This is WSL 1, which has no GPU and slow files.",
        "wsl-memory": "Windows gives WSL 2 a part of its memory only.",
        "wsl-pinned-memory": "Windows limits pinned memory, and lets a full GPU spill into the host's memory.",
    },
    "Drives": {
        "drive-fit": "The drive suits its use and has the space for it.",
        "drive-unknown": "What the place lies on cannot be read.",
        "drive-readonly": "The place lies on a drive that is mounted read-only.",
        "place-not-writable": "The place is no directory, or this user may not write there.",
        "drive-short": "The drive has less free space than the run needs.",
        "drive-network": "The place is shared or lies across the network.",
        "drive-object-store": "The place is an object store that is mounted as a file system.",
        "drive-in-memory": "The place lies in memory and takes it from the run.",
        "drive-container-layer": "The place is the container's own layer: slow, and gone with the container.",
        "drive-spinning": "The place lies on a spinning disk.",
        "wsl-windows-drive": "The place is a Windows drive, which WSL reaches through a slow file server.",
        "windows-file-system": "The drive has a file system of Windows: slow from here, or without files of this size.",
        "drive-rate": "Measured: the drive is fast enough.",
        "drive-slow": "Measured: the drive sets the pace of the run.",
        "drive-not-measured": "The drive has too little free space to be measured.",
        "drive-failing": "Reading from or writing to the drive failed.",
    },
    "Python and libraries": {
        "program-not-installed": "This program is not installed, so what it needs is not known.",
        "python-fit": "The version of Python is supported.",
        "python-unsupported": "The version of Python is not supported.",
        "libraries-fit": "How many libraries have the versions that are asked for.",
        "library-missing": "A library that is needed is not installed.",
        "library-version": "A library has a version that is not supported.",
        "library-untested": "A library has a supported version other than the tested one.",
        "kernel-fit": "The compiled cast to FP8 is installed.",
        "kernel-missing": "The compiled cast to FP8 was not built: the same results, more slowly.",
        "kernel-off": "A variable turns the compiled cast to FP8 off: the same results, more slowly.",
    },
    "vLLM": {
        "vllm-fit": "There is a vLLM, of a build and a version that fit.",
        "vllm-not-used": "The recipe says verify: structure, so vLLM is not looked for.",
        "vllm-missing": "There is no vLLM: results are checked in structure alone.",
        "vllm-broken": "The vLLM that was named, or found, does not work.",
        "vllm-command-fails": "The command `vllm serve` of this vLLM does not start.",
        "vllm-cpu-build": "vLLM is built for CPUs, and there is a GPU.",
        "vllm-gpu-build": "vLLM is built for GPUs, and there is none.",
        "vllm-untested": "vLLM has a version other than the tested ones.",
    },
    "The hub's variables": {
        "hub-cache": "Where models from the hub are kept.",
        "hub-offline": "A variable keeps everything from the network.",
        "hub-variable-old": "A variable of the hub's libraries has an old name that is still read.",
        "hub-variable-ignored": "A variable of the hub's libraries is not read any more.",
    },
    "The recipe": {
        "plan-made": "The recipe can be planned: what it makes of how much, where, with how much memory.",
        "layers-placed": "Where layers run while calibrating, and where their activations are kept.",
        "already-done": "An identical run has made this result already.",
        "run-refused": "The run would refuse to start.",
        "plan-broken": "Planning failed in a library.",
        "source-not-cached": "The model is not in the cache, and a variable keeps it from being fetched.",
    },
}
CODES = {code: meaning for codes in _BY_AREA.values() for code, meaning in codes.items()}


@dataclass(frozen=True)
class Finding:
    """One sentence about the machine.

    Attributes:
        code: what was found, one of `CODES`; for programs.
        area: what it is about, a word.
        status: ``ok``; ``note``, good to know; ``warning``, the run works but worse; ``unfit``, it will not work.
        text: the sentence.
        remedy: what to do; None where nothing needs to be done.
    """

    code: str
    area: str
    status: Status
    text: str
    remedy: str | None = None


def codes_page() -> str:
    """docs/doctor-codes.md, made of the table of codes."""
    lines = [
        "# Codes of quantize doctor",
        "",
        "`quantize doctor --json` lists findings. Each has a `code`, an `area`, a `status`, a sentence (`text`) and",
        "what to do about it (`remedy`, or null). A program decides by code and status: codes are stable, sentences",
        "may change. The status is `ok`; `note`, good to know; `warning`, the run works but worse; or `unfit`, it",
        "will not work. A code may come with another status for another recipe: one needs a GPU, another does not.",
    ]
    for area, codes in _BY_AREA.items():
        lines += ["", f"## {area}", "", "| code | meaning |", "|---|---|"]
        lines += [f"| `{code}` | {meaning} |" for code, meaning in codes.items()]
    return "\n".join(lines) + "\n"
