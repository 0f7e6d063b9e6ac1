"""What may still change at a result that is published: its verification, and its serve config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import VerificationFailed
from pipeline.recipe.recipe import load
from pipeline.report.console import Console
from pipeline.run import runner
from pipeline.verify import verify
from tests.conftest import assert_one_clear_line, make_plain_checkpoint


def test_another_serve_section_writes_profile_and_card_alone(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert quantize(recipe).returncode == 0
    out = tmp_path / "out"
    profile = out / "quantize" / "serve.yaml"

    def state() -> dict[Path, tuple[bytes, int]]:
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}

    before = state()
    done = quantize(recipe, "serve={served_model_name: mine, max_num_seqs: 7}")
    assert done.returncode == 0, done.stderr
    assert f"{profile}: written anew, as the recipe's serve section now says" in done.stdout
    assert "done already" in done.stdout and "served-model-name: mine" in profile.read_text()
    after = state()
    assert set(after) == set(before)
    changed = {path for path in after if after[path] != before[path]}
    assert changed == {profile, out / "README.md", out / "quantize" / "events.jsonl"}, "the card says the command, too"
    done = quantize(recipe, "serve={served_model_name: mine, max_num_seqs: 7}")
    assert done.returncode == 0 and "written anew" not in done.stdout and state() == after
    done = quantize(recipe, "serve={tensor_parallel_size: 3}")
    assert_one_clear_line(done, 2, "serve.tensor_parallel_size")
    assert state() == after
    assert quantize("verify", out, "--level", "structure").returncode == 0


def test_a_damaged_profile_is_written_anew(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe, profile = write_recipe(make_plain_checkpoint(tmp_path / "source")), tmp_path / "out/quantize/serve.yaml"
    assert quantize(recipe).returncode == 0
    before = profile.read_bytes()
    profile.write_bytes(before[:50] + b"\xff\x00" + before[52:])
    done = quantize(recipe)
    assert done.returncode == 0 and "written anew" in done.stdout, done.stderr
    assert profile.read_bytes() == before


@pytest.mark.vllm
def test_a_result_that_failed_in_vllm_does_not_pass_by_being_asked_less(
    tmp_path: Path, small_model: Any, quantize_here: Any, write_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_recipe(small_model("qwen3")), tmp_path / "out"
    assert quantize_here(recipe).returncode == 0
    weights = out / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])  # the structure alone does not show it
    failed = quantize_here(recipe, "verify=load")
    assert failed.returncode == 1 and "it is published, but fails verification" in failed.stderr
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    done = quantize_here(recipe, "serve={max_num_seqs: 7}")
    assert_one_clear_line(done, 1, "it is published, but has failed verify: load; do not serve it")
    assert "its bytes are not those that the run wrote" in done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(verify, "find", lambda *_: None)
        with pytest.raises(VerificationFailed, match="has failed verify: load"):
            runner.run(load(recipe, ("verify=load",)), Console())
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()} == before
    weights.write_bytes(sound)
    done = quantize_here(recipe, "verify=load")
    assert done.returncode == 0 and "verification: passed" in done.stdout, done.stderr
    assert quantize_here(recipe).returncode == 0


@pytest.mark.vllm
def test_a_profile_that_vllm_refuses_does_not_replace_one(
    tmp_path: Path, small_model: Any, quantize_here: Any, write_recipe: Any
) -> None:
    recipe = write_recipe(small_model("qwen3"))
    assert quantize_here(recipe).returncode == 0
    profile = tmp_path / "out" / "quantize" / "serve.yaml"
    before = profile.read_bytes()
    done = quantize_here(recipe, "verify=load", "serve={extra: {prot: 8001}}")
    assert_one_clear_line(done, 2, "refuses the profile: unrecognized arguments: --prot 8001", "stays as it was")
    assert profile.read_bytes() == before
    done = quantize_here(recipe, "verify=load", "serve={extra: {port: 8001}}")
    assert done.returncode == 0, done.stderr
    assert "written anew" in done.stdout and ", which vllm" in done.stdout
    assert "port: 8001" in profile.read_text()
