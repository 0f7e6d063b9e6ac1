"""GPU, driver, memory, processors, threads, limits and WSL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline.backends.registry import needs_data
from pipeline.calibration.placement import DEVICE_BASE, SHARE
from pipeline.doctor.finding import Finding, Status
from pipeline.doctor.libraries import torch_build
from pipeline.machine.gpus import GPU, VISIBLE, GPUs, visible
from pipeline.machine.memory import available_memory, meminfo, total_memory
from pipeline.machine.processes import open_files
from pipeline.machine.system import Processors, System, default_threads, processors, wsl
from pipeline.units import parse_size, size_text

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan
    from pipeline.recipe.recipe import Recipe

NATIVE_FP8 = (8, 9)
# The oldest driver of each major CUDA release (Linux; Windows' numbers of the same branch are higher).
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
# The oldest GPUs that CUDA 13 compiles for.
OLDEST_GPU = {13: (7, 5)}
OPEN_FILES = 64  # of Python, its libraries, the journal and the events
OMP = "OMP_NUM_THREADS"


# --- GPU ---------------------------------------------------------------------------------------------


def gpu_findings(system: System, seen: GPUs, recipe: Recipe | None, plan: Plan | None) -> Iterator[Finding]:
    """Is there a GPU, can torch use it, what will its results be served with, and is it free."""
    if recipe is not None and recipe.runtime.device == "cpu":
        yield Finding("gpu-not-used", "gpu", "ok", "not used: the recipe says runtime.device: cpu")
        return
    bad: Status = "warning"  # of a GPU that cannot be used
    if recipe is not None and not needs_data(recipe):
        bad = "note"
    elif recipe is not None and recipe.runtime.device == "cuda":
        bad = "unfit"
    if not seen.found:
        yield _no_gpu(system, seen, bad)
        return
    wanted = system.environment.get(VISIBLE)
    chosen = visible(seen.found, wanted)
    if wanted is not None and not chosen:
        yield Finding(
            "gpu-hidden",
            "gpu",
            bad,
            f"CUDA_VISIBLE_DEVICES={wanted!r} hides the machine's {len(seen.found)} GPU(s): {_names(seen.found)}",
            "unset it, or name a GPU by its number or UUID; see nvidia-smi -L",
        )
        return
    first = chosen[0]
    if (
        wanted is not None
        and len({gpu.name for gpu in seen.found}) > 1
        and not wanted.startswith(("GPU-", "MIG-"))
        and system.environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    ):
        yield Finding(
            "gpu-order",
            "gpu",
            "note",
            f"CUDA_VISIBLE_DEVICES={wanted} counts the fastest GPU first, nvidia-smi by bus: {_names(seen.found)}",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPU by its UUID",
        )
    yield from _driver(system, first, bad)
    yield from _capability(first, recipe)
    yield from _device_memory(first, recipe, plan)
    if len(chosen) > 1:
        yield Finding(
            "gpu-several",
            "gpu",
            "note",
            f"{len(chosen)} GPUs: a run uses one, the first that it sees: {first.name}",
            "give other runs the others with CUDA_VISIBLE_DEVICES=1 and so on",
        )


def _names(found: Sequence[GPU]) -> str:
    return ", ".join(f"{gpu.index}: {gpu.name}" for gpu in found)


def _no_gpu(system: System, seen: GPUs, bad: Status) -> Finding:
    if seen.problem is not None:
        remedy = "reload the driver (reboot after an update of it), then try nvidia-smi"
        if wsl(system):
            remedy = "update the NVIDIA driver in Windows, run wsl --update and wsl --shutdown, then try nvidia-smi"
        return Finding("gpu-driver-failing", "gpu", bad, f"{seen.tool}: {seen.problem}", remedy)
    if seen.driver and not seen.node:
        return Finding(
            "gpu-not-in-container",
            "gpu",
            bad,
            f"the host has NVIDIA's driver {seen.driver}, this container sees no GPU (no /dev/nvidiactl)",
            "start it with the NVIDIA container toolkit: docker run --gpus all",
        )
    if seen.driver:
        return Finding(
            "gpu-tools-missing",
            "gpu",
            bad,
            f"NVIDIA's driver {seen.driver} is loaded, nvidia-smi finds no GPU or is not on the PATH",
            "install the driver's tools (nvidia-utils), or put nvidia-smi on the PATH",
        )
    text = "no NVIDIA GPU and no driver"
    if bad == "unfit":
        return Finding(
            "gpu-missing",
            "gpu",
            "unfit",
            f"{text}; the recipe says runtime.device: cuda",
            "set runtime.device: auto or cpu",
        )
    if bad == "note":
        return Finding("gpu-not-needed", "gpu", "ok", f"{text}; this recipe needs none")
    return Finding(
        "gpu-missing",
        "gpu",
        "note",
        f"{text}: layers run on the CPU while calibrating, many times slower",
        "lower calibration.samples, or run on a machine with a GPU; kv_cache: none with fp8_dynamic needs neither",
    )


def _driver(system: System, gpu: GPU, bad: Status) -> Iterator[Finding]:
    build = torch_build(system)
    if build is None:
        yield Finding("gpu-fit", "gpu", "ok", f"{gpu.name}, driver {gpu.driver}")
        return  # that torch is missing is told with the libraries
    if build.cuda is None:
        yield Finding(
            "torch-without-cuda",
            "gpu",
            bad,
            f"{gpu.name} is here, but torch {build.version} is a build without CUDA: layers run on the CPU",
            "install torch's CUDA build of the same version: pip install --force-reinstall torch=="
            f"{build.version.partition('+')[0]} from the index that pytorch.org names for CUDA",
        )
        return
    major = int(build.cuda.partition(".")[0])
    oldest = OLDEST_DRIVER.get(major)
    have = tuple(map(int, re.findall(r"\d+", gpu.driver)[:2]))
    if oldest is not None and have < oldest:
        older = max((cuda for cuda, needed in OLDEST_DRIVER.items() if needed <= have), default=None)
        yield Finding(
            "gpu-driver-old",
            "gpu",
            bad,
            f"{gpu.name}: driver {gpu.driver} is too old for torch {build.version}, a CUDA {build.cuda} build, which "
            f"needs {oldest[0]}.{oldest[1]} or newer",
            f"update the driver{' in Windows' if wsl(system) else ''}"
            + (f", or install a torch built for CUDA {older}" if older else ""),
        )
        return
    oldest_gpu = OLDEST_GPU.get(major)
    if oldest_gpu is not None and gpu.capability is not None and gpu.capability < oldest_gpu:
        yield Finding(
            "gpu-too-old",
            "gpu",
            bad,
            f"{gpu.name}: compute capability {_dotted(gpu.capability)}; CUDA {build.cuda}, which torch {build.version} "
            f"is built with, runs on {_dotted(oldest_gpu)} and newer",
            "set runtime.device: cpu, or install a torch built for CUDA 12",
        )
        return
    yield Finding(
        "gpu-fit", "gpu", "ok", f"{gpu.name}, driver {gpu.driver}, torch {build.version} for CUDA {build.cuda}"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _capability(gpu: GPU, recipe: Recipe | None) -> Iterator[Finding]:
    """What vLLM serves an FP8 checkpoint with here; read from vLLM 0.32.0's own conditions."""
    if gpu.capability is None:
        yield Finding(
            "fp8-unknown",
            "fp8",
            "note",
            f"{gpu.name}: its driver does not tell the compute capability",
            "update the driver",
        )
        return
    what = f"{gpu.name}, compute capability {_dotted(gpu.capability)}"
    if gpu.capability >= NATIVE_FP8:
        yield Finding("fp8-native", "fp8", "ok", f"{what}: FP8 in hardware, weights and activations")
        return
    cache = recipe is None or recipe.kv_cache == "fp8"
    if gpu.capability >= (8, 0):
        attention = "; an FP8 KV cache in FlashInfer alone" if cache else ""
        yield Finding(
            "fp8-weights-only",
            "fp8",
            "note",
            f"{what}: no FP8 in hardware. It converts as well as any, but vLLM serves the result here with Marlin: "
            f"weights in FP8, arithmetic in BF16{attention}",
            "for FP8 arithmetic serve on compute capability 8.9 or newer (Ada, Hopper, Blackwell)"
            + ("; here install flashinfer in vLLM's environment, or serve with kv_cache_dtype: auto" if cache else ""),
        )
        return
    marlin = gpu.capability >= (7, 5)
    yield Finding(
        "fp8-unsupported",
        "fp8",
        "warning",
        f"{what}: no FP8 and no BF16 in hardware. "
        + (
            "vLLM serves fp8_dynamic here with Marlin, weights alone in FP8; it refuses ModelOpt's fp8 and an FP8 "
            "KV cache"
            if marlin
            else "vLLM serves no FP8 checkpoint here"
        ),
        "convert here if you must, verify and serve on compute capability 8.9 or newer",
    )


def _device_memory(gpu: GPU, recipe: Recipe | None, plan: Plan | None) -> Iterator[Finding]:
    if gpu.free is None or gpu.total is None:
        yield Finding(
            "gpu-memory-unknown",
            "gpu memory",
            "note",
            f"{gpu.name}: nvidia-smi does not tell its memory; it is a slice, or shares the host's",
        )
        return
    free, what = gpu.free, f"{gpu.name}: {size_text(gpu.free)} of {size_text(gpu.total)} free"
    limit = recipe.runtime.device_memory if recipe is not None else None
    if limit is not None and parse_size(limit) < free:
        free, what = parse_size(limit), f"{what}, {limit} allowed by runtime.device_memory"
    if plan is not None and plan.calibration is not None:
        need = plan.calibration.needs.compute + DEVICE_BASE
        if need > free * SHARE:
            yield Finding(
                "gpu-memory-short",
                "gpu memory",
                "unfit",
                f"{what}; one layer needs {size_text(need)}, and a fifth of what is free stays so",
                "end other programs on it (nvidia-smi lists them), lower calibration.batch_tokens, "
                "or set runtime.device: cpu",
            )
            return
        what += f"; one layer needs {size_text(need)}"
    if gpu.free < gpu.total / 2:
        yield Finding(
            "gpu-busy",
            "gpu memory",
            "warning",
            f"{what}; other programs hold the rest",
            "nvidia-smi lists them; end what can be",
        )
        return
    yield Finding("gpu-memory-fit", "gpu memory", "ok", what)


# --- memory ------------------------------------------------------------------------------------------


def memory_findings(system: System, plan: Plan | None) -> Iterator[Finding]:
    """Free memory within a container's limit, against the plan's need; swap."""
    found = meminfo(system)
    if "MemTotal" not in found:
        yield Finding(
            "memory-unknown", "memory", "note", "/proc/meminfo cannot be read: how much memory there is is not known"
        )
        return
    total, free = total_memory(system), available_memory(system)
    what = f"{size_text(free)} of {size_text(total)} free"
    limited = total < found["MemTotal"]
    if limited:
        what = f"{size_text(free)} free of {size_text(total)}, a limit of the container or control group"
    more = "raise the container's memory limit (docker --memory, a pod's limits, systemd's MemoryMax)"
    if wsl(system):
        more = "raise memory= in .wslconfig, then wsl --shutdown"
    need = plan.peak_memory if plan is not None else None
    if need is not None and need > free:
        for_good = need > total
        less = "lower runtime.threads" + (
            "" if plan is None or plan.calibration is None else ", calibration.samples or calibration.batch_tokens"
        )
        way_out = "use a larger machine" if for_good else "end other programs"
        yield Finding(
            "memory-short",
            "memory",
            "unfit" if for_good else "warning",
            f"{what}; the run needs up to {size_text(need)}",
            f"{more if limited or (for_good and wsl(system)) else way_out}, or {less}",
        )
    else:
        yield Finding(
            "memory-fit", "memory", "ok", what + ("" if need is None else f"; the run needs up to {size_text(need)}")
        )
    swapped = found.get("SwapTotal", 0) - found.get("SwapFree", 0)
    if swapped > max(256 << 20, found["MemTotal"] // 50):
        short = free < total / 4
        yield Finding(
            "memory-swapped",
            "swap",
            "warning" if short else "note",
            f"{size_text(swapped)} are swapped out"
            + (", and little memory is free: buffers may follow" if short else ""),
            "end what holds the memory before a long run" if short else None,
        )


# --- processors --------------------------------------------------------------------------------------


def processor_findings(system: System, recipe: Recipe | None) -> Iterator[Finding]:
    """Cores, quota, affinity, and whether threads match them."""
    found = processors(system)
    best = found.threads
    what = f"{found.cores} physical core(s), {found.allowed} logical"
    if found.allowed < found.online:
        what += f", of {found.online} of the machine that this process may use"
    if found.quota is not None:
        what += f"; a quota of {found.quota:.3g} CPU(s)"
    yield Finding("cores-fit", "cores", "ok", what)
    asked = recipe.runtime.threads if recipe is not None else None
    yield _run_threads(found, asked, default_threads(system))
    yield from _omp(system, found, best)


def _run_threads(found: Processors, asked: int | None, default: int) -> Finding:
    """The recipe's number of threads; without one a run takes as many as compute at full speed."""
    threads, best = asked or default, found.threads
    if threads <= best:
        return Finding("threads-fit", "threads", "ok", f"a run computes with {threads} thread(s)")
    room = found.allowed if found.quota is None else min(found.allowed, found.quota)
    over = threads > room
    return Finding(
        "threads-many",
        "threads",
        "warning" if over else "note",
        f"runtime.threads: {threads}, "
        + (f"{room:.3g} CPU(s) may be used: they wait for each other" if over else f"on {best} physical core(s)"),
        f"set runtime.threads={best}",
    )


def _omp(system: System, found: Processors, best: int) -> Iterator[Finding]:
    text = system.environment.get(OMP, "")
    remedy = f"export {OMP}={best}"
    if not text:
        if found.allowed > best:
            yield Finding(
                "omp-unset",
                "threads",
                "note",
                f"{OMP} is not set: libraries start a thread for each of {found.allowed} logical CPUs, "
                f"{best} compute at full speed",
                remedy,
            )
        return
    first = text.partition(",")[0].strip()
    if not first.isdigit() or int(first) < 1:
        yield Finding(
            "omp-invalid", "threads", "warning", f"{OMP}={text!r} is no number of threads and is ignored", remedy
        )
    elif int(first) > best:
        over = found.quota is not None and int(first) > found.quota
        limit = f"a quota of {found.quota:.3g} CPU(s)" if over else f"{best} physical core(s)"
        yield Finding("omp-many", "threads", "warning" if int(first) > found.allowed or over else "note",
                      f"{OMP}={first}, with {limit}", remedy)  # fmt: skip
    elif int(first) < best:
        yield Finding(
            "omp-few", "threads", "note", f"{OMP}={first}: libraries leave {best - int(first)} core(s) idle", remedy
        )
    else:
        yield Finding("omp-fit", "threads", "ok", f"{OMP}={first}")


# --- limits and WSL ----------------------------------------------------------------------------------


def limit_findings(system: System, plan: Plan | None) -> Iterator[Finding]:
    """Open files, against the shards of source and result."""
    limits = open_files(system)
    if limits is None:
        return
    soft, hard = limits
    need = OPEN_FILES + (len(plan.checkpoint.shards) + len(plan.shards) if plan is not None else 64)
    if soft < need:
        remedy = f"ulimit -n {min(hard, max(1024, need))}"
        if hard < need:
            remedy = (
                "raise the hard limit (limits.conf, docker --ulimit nofile=4096), or use larger shards (shard_size)"
            )
        why = "each shard of source and result is one" if plan is not None else "a model of many shards needs more"
        yield Finding(
            "open-files-few",
            "open files",
            "warning",
            f"at most {soft} open files, about {need} are needed: {why}",
            remedy,
        )


def wsl_findings(system: System, seen: GPUs) -> Iterator[Finding]:
    """What Windows keeps for itself."""
    version = wsl(system)
    if version is None:
        return
    if version == 1:
        yield Finding(
            "wsl-1",
            "wsl",
            "warning",
            "WSL 1: no GPU, and slow files",
            "convert the distribution in Windows: wsl --set-version NAME 2",
        )
        return
    total = meminfo(system).get("MemTotal", 0)
    yield Finding(
        "wsl-memory",
        "wsl",
        "note",
        f"WSL 2: its virtual machine has {size_text(total)}, half of Windows' memory unless .wslconfig says otherwise",
        "for more, set memory= under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown",
    )
    if seen.found:
        yield Finding(
            "wsl-pinned-memory",
            "wsl",
            "note",
            "WSL 2: Windows limits pinned memory, and lets a full GPU spill into the host's memory instead of failing",
            "set runtime.device_memory below what is free; where pinning fails, runtime.hidden_states=file pins less",
        )
