"""The Python call beside the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import convert
from pipeline.errors import OtherRun, UsageError
from tests.conftest import all_tensors, make_plain_checkpoint


def test_the_call_does_what_the_command_does(
    quantize: Callable[..., subprocess.CompletedProcess[str]],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize(recipe).returncode == 0
    outcome = convert(recipe, [f"output={tmp_path / 'called'}"])
    assert "published" not in capsys.readouterr().err
    assert outcome.output == tmp_path / "called" and not outcome.already
    assert outcome.report is not None and outcome.report.passed
    assert all_tensors(outcome.output) == all_tensors(tmp_path / "out")
    again = convert(str(recipe), [f"output={tmp_path / 'called'}"], quiet=True)
    assert again.already and capsys.readouterr() == ("", "")


def test_a_mapping_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {
        "model": {"source": str(make_plain_checkpoint(tmp_path / "source"))},
        "output": str(tmp_path / "out"),
        "backend": "llmcompressor",
        "scheme": "fp8_dynamic",
        "kv_cache": "none",
        "verify": "structure",
    }
    assert convert(recipe, quiet=True).output == tmp_path / "out"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(OtherRun, match="shard_size"):
        convert({**recipe, "shard_size": "1MB"}, quiet=True)
    assert not convert({**recipe, "shard_size": "1MB"}, fresh=True, quiet=True).already
    with pytest.raises(UsageError, match="shard_sise: unknown key; did you mean shard_size"):
        convert({**recipe, "shard_sise": "1MB"})


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, pipeline; print(sorted({'torch', 'yaml', 'rich', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
