"""The plan: actions, layout, refusals; from headers alone and without heavy imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pipeline.checkpoint.source import DTYPE_BYTES, open_checkpoint
from pipeline.errors import UsageError
from pipeline.model.selection import select
from pipeline.plan import layout
from pipeline.plan import plan as plans
from pipeline.recipe import recipe as recipes
from tests.conftest import ROOT, assert_one_clear_line, make_plain_checkpoint
from tests.damage import tie_head


def make(source: Path, *overrides: str) -> plans.Plan:
    text = f"model: {{source: '{source}'}}\noutput: out\nbackend: llmcompressor\nscheme: fp8_dynamic\nkv_cache: none\n"
    return plans.make_plan(recipes.parse(text, overrides=overrides), open_checkpoint(source))


def test_every_output_byte_has_one_place(tmp_path: Path) -> None:
    made = make(
        make_plain_checkpoint(tmp_path / "s", layers=5, wide=1111, hidden=67, vocabulary=3001), "shard_size=1MB"
    )
    assert len(made.shards) >= 2
    covered: dict[int, list[tuple[int, int]]] = {}
    for piece in made.pieces:
        for write in piece.writes:
            covered.setdefault(write.shard, []).append((write.offset, write.offset + write.nbytes))
    for index, shard in enumerate(made.shards):
        position = len(shard.header)
        for begin, end in sorted(covered[index]):
            assert begin == position
            position = end
        assert position == shard.size
        assert shard.size <= 1_000_000 + len(shard.header)
    for output in made.outputs.values():
        assert output.offset % DTYPE_BYTES[output.dtype] == 0, "a misaligned tensor cannot be mapped"


def test_units_are_in_order_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "UNIT_BYTES", 40_000)
    monkeypatch.setattr(layout, "PIECE_BYTES", 5_000)
    made = make(make_plain_checkpoint(tmp_path / "s"))
    units = [piece.unit for piece in made.pieces]
    assert units == sorted(units) and set(units) == set(range(made.units)) and made.units >= 3
    for unit in range(made.units):
        assert sum(piece.result_nbytes for piece in made.pieces if piece.unit == unit) <= 40_000
    assert max(piece.nbytes for piece in made.pieces) <= 5_000


def test_the_plan_of_a_run_imports_nothing_heavy(tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "s")
    code = f"""
import sys
from pipeline.cli import main
recipe = sys.argv[1]
for arguments in ([recipe, "output={tmp_path}/a"], ["plan", recipe, "output={tmp_path}/b"], ["plan", recipe, "--json"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, end.code
heavy = {{"torch", "transformers", "numpy", "compressed_tensors", "llmcompressor", "modelopt"}} & set(sys.modules)
assert not heavy, heavy
print("light")
"""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: '{source}'}}\noutput: x\nbackend: llmcompressor\nscheme: fp8_dynamic\nkv_cache: none\n"
    )
    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "light"


def test_json_tells_every_tensors_fate(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    source = tie_head(make_plain_checkpoint(tmp_path / "source", config={"tie_word_embeddings": True}))
    done = quantize("plan", write_recipe(source), "--json", "ignore=['re:.*o_proj', model.layers.1.mlp.down_proj]")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    actions = {tensor["name"]: (tensor["fate"], tensor["reason"]) for tensor in told["tensors"]}
    assert len(actions) == 21
    assert actions["model.layers.0.self_attn.q_proj.weight"][0] == "quantize"
    assert actions["model.layers.0.self_attn.o_proj.weight"] == ("copy", "the recipe's ignore")
    assert actions["model.layers.1.mlp.down_proj.weight"] == ("copy", "the recipe's ignore")
    assert actions["model.embed_tokens.weight"] == ("copy", "embedding")
    assert actions["model.norm.weight"] == ("copy", "norm or bias")
    assert actions["lm_head.weight"][0] == "drop" and "tied" in actions["lm_head.weight"][1]
    assert told["output"]["bytes"] == sum(shard["bytes"] for shard in told["output"]["shards"])
    assert not (tmp_path / "out.partial").exists()


def test_the_plan_says_how_long_the_run_will_take(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    """By the rough rule, part by part; without vLLM for its structure alone."""
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    last = quantize("plan", recipe).stdout.splitlines()[-1]
    assert last.startswith("estimate: about 1 s by a rough rule (start 1 s)"), last
    assert last.endswith("; quantize RECIPE --smoke measures it")
    told = json.loads(quantize("plan", recipe, "--json").stdout)["estimate"]
    assert list(told["parts"]) == ["start", "stream", "verify"] and told["basis"] == "rule"
    assert told["seconds"] == pytest.approx(sum(told["parts"].values())) and told["parts"]["stream"] > 0


def test_the_plan_is_what_the_run_writes(tmp_path: Path, quantize: Any, write_recipe: Any) -> None:
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source", vocabulary=9000), more="shard_size: 1MiB\n")
    told = json.loads(quantize("plan", recipe, "--json").stdout)
    assert quantize(recipe).returncode == 0
    assert len(told["output"]["shards"]) > 1
    for shard in told["output"]["shards"]:
        assert (tmp_path / "out" / shard["file"]).stat().st_size == shard["bytes"]
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:  # the library's own reader accepts what was laid out here
            for name in file.keys():  # noqa: SIM118 - a file, not a dict
                found[name] = (path.name, tuple(file.get_slice(name).get_shape()), file.get_tensor(name).numel() > 0)
    planned = {
        output["name"]: (output["file"], tuple(output["shape"]), True)
        for tensor in told["tensors"]
        for output in tensor["outputs"]
    }
    assert found == planned


@pytest.mark.parametrize(
    ("ignore", "words"),
    [
        ("[model.layers.7.mlp]", ("matches no module", "model.layers.0.self_attn.q_proj")),
        ("[visual]", ("matches no module",)),
        ("[model.layers.0.self_attn.q_proj]", ("q_proj of model.layers.0.self_attn", "k_proj, v_proj", "qkv_proj")),
        ("['re:.*up_proj']", ("up_proj of model.layers.0.mlp", "gate_up_proj")),
    ],
)
def test_ignores_that_cannot_be_meant(ignore: str, words: tuple, tmp_path: Path, quantize: Any, write_recipe: Any):
    recipe = write_recipe(make_plain_checkpoint(tmp_path / "source"))
    assert_one_clear_line(quantize("plan", recipe, f"ignore={ignore}"), 2, *words)
    assert_one_clear_line(quantize(recipe, f"ignore={ignore}"), 2, *words)


def test_ignores_that_change_nothing_are_no_mistake(tmp_path: Path) -> None:
    made = make(make_plain_checkpoint(tmp_path / "s"), "ignore=[lm_head, 're:.*norm']")
    assert sum(action.action == "quantize" for action in made.actions.values()) == 14


def test_an_ignore_of_some_experts_is_refused_and_of_all_is_not(small_model: Any) -> None:
    for name in ("qwen3_moe", "qwen3_vl_moe"):
        checkpoint = open_checkpoint(small_model(name))
        with pytest.raises(UsageError, match="its experts"):
            select(checkpoint, [r"re:.*layers\.0\.mlp\.experts\.3\..*"])
        with pytest.raises(UsageError, match="its experts"):
            select(checkpoint, [r"re:.*layers\.0\.mlp\.experts\.\d+\.down_proj"])
        chosen = select(checkpoint, [r"re:.*layers\.0\.mlp\.experts\..*"])
        gone = [n for n, c in chosen.choices.items() if c.role == "ignored"]
        assert gone and all(".layers.0.mlp.experts" in n for n in gone)
        assert sum(".layers.0.mlp.experts." in n for n in chosen.kept_linears) == 24


def test_an_older_config_without_a_text_part(tmp_path: Path, small_model: Any) -> None:
    """The hub's Qwen2.5-VL keeps the language model's numbers at the top of its config."""
    source = tmp_path / "flat"
    source.mkdir()
    for path in small_model("qwen2_5_vl").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    nested = json.loads((source / "config.json").read_text())
    flat = {**nested.pop("text_config"), **nested}
    (source / "config.json").write_text(json.dumps(flat))
    assert select(open_checkpoint(source)).choices == select(open_checkpoint(small_model("qwen2_5_vl"))).choices


def test_notes_on_what_a_careful_user_must_know(tmp_path: Path) -> None:
    config = {"model_type": "brandnew", "auto_map": {"AutoModel": "modeling.X"}}
    made = make(make_plain_checkpoint(tmp_path / "s", config=config), "verify=load", "runtime.device=cuda")
    told = "\n".join(made.warnings)
    for words in ("brandnew is not among", "trust_remote_code is off", "cuda is not used"):
        assert words in told


def test_sparse_checkpoints_of_real_shapes(tmp_path: Path) -> None:
    """The mixture of experts at its real size: 62 GB of names and shapes, no bytes."""
    target = tmp_path / "moe"
    script = ROOT / "scripts" / "make_checkpoint.py"
    command = [sys.executable, script, "qwen3_vl_30b_a3b", target, "--sparse", "--shard-size", "1GB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = make(target)
    assert len(made.checkpoint.shards) >= 60
    assert sum(output.dtype == "F8_E4M3" for output in made.outputs.values()) == 48 * (128 * 3 + 4)
    assert made.peak_memory < 800e6
    assert 32e9 < made.output_nbytes < 33e9
