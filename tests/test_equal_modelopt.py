"""Bit for bit what ModelOpt makes in memory of the same batches, and what the default mode changes about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import open_checkpoint
from tests.conftest import SHARED, all_tensors
from tests.warm import Warm

pytestmark = pytest.mark.peer

# ModelOpt's own way: the whole model, its default FP8 rules with the KV rule before those that switch the vision off.
IN_MEMORY = """
import copy, os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # on a GPU it chooses kernels, as it does in a run of this tool
import torch, transformers
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from pipeline.recipe import recipe
from pipeline.plan import plan
from pipeline.checkpoint import hub
recipe_file, target = sys.argv[1:]
wanted = recipe.load(recipe_file)
made = plan.make_plan(wanted, hub.resolve(wanted.model.source, None))
torch.set_num_threads(made.threads)
source = wanted.model.source
config = transformers.AutoConfig.from_pretrained(source)
device = made.calibration.device.kind
model = getattr(transformers, config.architectures[0]).from_pretrained(source, dtype="auto").eval().to(device)
rules = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
cache = [r for r in mtq.FP8_KV_CFG["quant_cfg"] if "bmm" in r["quantizer_name"]]
rules["quant_cfg"] = rules["quant_cfg"][:3] + cache + rules["quant_cfg"][3:]
batches = [
    torch.tensor(b.ids, dtype=torch.long, device=device).view(b.rows, b.length)
    for b in made.calibration.batches.batches
]
assert sum(b.numel() for b in batches) == made.calibration.batches.tokens

def loop(model):
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)

mtq.quantize(model, rules, forward_loop=loop)
with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=target)
"""

RECIPE = """\
model: {{source: '{source}'}}
output: {output}
backend: modelopt
scheme: fp8
calibration: {{captions: '{captions}', samples: {samples}, max_length: 200}}
verify: structure
"""
CAPTIONS = SHARED / "data" / "coco" / "captions_val2017.json"
EXACT = "backend_options: {exact: true}\n"


@pytest.fixture
def source_of(trained: Callable[[str], Path], small_model: Callable[[str], Path]) -> Callable[[str], Path]:
    return lambda name: trained(name) if name.endswith("_coco") else small_model(name)


def write_recipe(path: Path, source: Path, output: Path, samples: int, more: str = "") -> Path:
    if not CAPTIONS.exists():
        pytest.skip(f"{CAPTIONS} is not here: COCO's captions are not part of the repository")
    path.write_text(RECIPE.format(source=source, output=output, captions=CAPTIONS, samples=samples) + more)
    return path


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl_coco", "qwen3_vl_coco", "qwen2_5_vl", "qwen3_vl", "qwen3", "llama", "llama_tied", "qwen3_moe",
             "qwen3_vl_moe"]
)  # fmt: skip
def test_exact_mode_is_modelopt(
    name: str, long: bool, source_of: Callable, warm: Warm, peers: Warm, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", source_of(name), tmp_path / "ours", 256 if long else 48, EXACT)
    done = warm(recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = peers(recipe, tmp_path / "theirs", code=IN_MEMORY, cwd=tmp_path)
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    a, b = all_tensors(tmp_path / "ours"), all_tensors(tmp_path / "theirs")
    assert a.keys() == b.keys()
    assert [key for key in a if a[key] != b[key]] == []
    assert sum(dtype == "F8_E4M3" for dtype, _, _ in a.values()) >= 20
    assert sum(key.endswith(".k_scale") for key in a) >= 3
    for file in ("config.json", "hf_quant_config.json"):
        ours, other = (json.loads((tmp_path / side / file).read_text()) for side in ("ours", "theirs"))
        for config in (ours, other):
            config.get("quantization_config", config).get("producer", {}).pop("version", None)
        assert ours == other, file


def test_exact_mode_names_what_transformers_leaves_out(source_of: Callable, warm: Warm, tmp_path: Path) -> None:
    """Layers of multi-token prediction stay in the result, and ModelOpt's config says so in ModelOpt's own form."""
    import torch
    from safetensors.torch import save_file

    from pipeline.verify.structure import check_structure

    source = shutil.copytree(source_of("qwen3"), tmp_path / "source")
    (index,) = source.glob("*.index.json")
    listed = json.loads(index.read_text())
    more = {
        name: torch.ones(64, 64, dtype=torch.bfloat16) for name in ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight")
    }
    save_file(more, source / "mtp.safetensors", metadata={"format": "pt"})
    index.write_text(
        json.dumps({**listed, "weight_map": {**listed["weight_map"], **dict.fromkeys(more, "mtp.safetensors")}})
    )
    done = warm(write_recipe(tmp_path / "r.yaml", source, tmp_path / "out", 16, EXACT))
    assert done.returncode == 0, done.stdout + done.stderr
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    older = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert section["ignore"][-1] == older["exclude_modules"][-1] == "mtp*"
    assert check_structure(tmp_path / "out", open_checkpoint(source), contents=True).passed


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "internvl", "llava"])
def test_exact_results_of_tied_vision_language_models_are_published(
    name: str, source_of: Callable, warm: Warm, tmp_path: Path
) -> None:
    """ModelOpt's own config ignores a head that has no tensor, and a vision tower by transformers' name of it."""
    from safetensors.torch import load_file, save_file

    from pipeline.verify.structure import check_structure

    source = shutil.copytree(source_of(name), tmp_path / "source")
    tensors: dict[str, Any] = {}
    for path in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        tensors.update(load_file(path) if path.suffix == ".safetensors" else {})
        path.unlink()
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("lm_head.weight")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    done = warm(write_recipe(tmp_path / "r.yaml", source, tmp_path / "out", 16, EXACT))
    assert done.returncode == 0, done.stdout + done.stderr
    report = check_structure(tmp_path / "out", open_checkpoint(source), contents=True)
    assert report.passed, report.problems
    assert "ignore-entry-modelopts" in {finding.code for finding in report.findings}
