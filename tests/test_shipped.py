"""The recipes that come with the program: the repository's files, and what a wheel gives outside a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.recipe import recipe as recipes
from pipeline.recipe.shipped import find, shipped
from tests.conftest import ROOT, assert_one_clear_line, make_plain_checkpoint


def test_the_repositorys_recipes_are_those_of_the_table() -> None:
    here = {path.stem: path.read_text() for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "demo"}
    assert here == {name: recipe.text() for name, recipe in shipped().items()}, "run: bash scripts/generate.sh"


def test_a_copy_names_its_own_file_and_is_the_same_recipe(quantize: Callable[..., object], tmp_path: Path) -> None:
    for name in shipped():
        text = find(name).text("mine.yaml")
        assert "quantize mine.yaml" in text and "$schema" not in text
        assert recipes.parse(text) == recipes.parse(find(f"{name}.yaml").text())
    with pytest.raises(UsageError, match="did you mean qwen3_8b-fp8-kv_fp8"):
        find("qwen3_8b-fp8-kv-fp8")


def test_recipes_are_listed_copied_and_never_overwritten(
    quantize: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    listed = quantize("recipes", cwd=tmp_path).stdout
    assert all(name in listed for name in shipped())
    done = quantize("recipes", "qwen3_8b-fp8_dynamic", "-o", "my.yaml", cwd=tmp_path)
    assert done.returncode == 0 and recipes.load(tmp_path / "my.yaml").scheme == "fp8_dynamic"
    (tmp_path / "my.yaml").write_text("mine")
    again = quantize("recipes", "qwen3_8b-fp8_dynamic", "-o", "my.yaml", cwd=tmp_path)
    assert_one_clear_line(again, 2, "my.yaml", "it exists already", "--force")
    assert (tmp_path / "my.yaml").read_text() == "mine"
    assert quantize("recipes", "qwen3_8b-fp8_dynamic", "-o", "my.yaml", "--force", cwd=tmp_path).returncode == 0
    assert quantize("recipes", "qwen3_8b-fp8_dynamic", cwd=tmp_path).returncode == 0
    assert (tmp_path / "qwen3_8b-fp8_dynamic.yaml").read_text().startswith("#   quantize qwen3_8b-fp8_dynamic.yaml ")
    assert_one_clear_line(quantize("recipes", "nothing-like-it", cwd=tmp_path), 2, "no shipped recipe")


def test_a_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """A wheel in an environment of its own, which sees this one's libraries and nothing of the checkout."""
    tree = tmp_path / "tree"  # setuptools would take what an earlier build left beside the sources
    left = shutil.ignore_patterns(".*", "out", "build", "*.egg-info", "__pycache__", "*.so", "tests")
    shutil.copytree(ROOT, tree, ignore=left)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheels", tree]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("fp8_pipeline-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # a plain entry: .pth files of that directory, such as the checkout's editable install, are not read
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def quantize(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [tmp_path / "venv" / "bin" / "quantize", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)

    def said(code: str) -> str:
        command = [python, "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout

    assert said("import pipeline; print(pipeline.__file__)").startswith(str(site))
    assert quantize("recipes", "qwen3_8b-fp8_dynamic", "-o", "my.yaml").returncode == 0
    source = make_plain_checkpoint(tmp_path / "source")
    done = quantize("my.yaml", f"model.source={source}", "output=out", "verify=structure")
    assert done.returncode == 0 and "published" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "out" / "README.md").exists(), "the card's template is part of the wheel"
    assert quantize("verify", "out", "--source", source, "--level", "structure").returncode == 0
    assert '"title"' in quantize("schema").stdout
    assert int(said("from pipeline.calibration.captions import EMBEDDED; print(EMBEDDED.stat().st_size)")) > 1000
