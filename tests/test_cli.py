"""The command line itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import assert_one_clear_line, make_plain_checkpoint


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
