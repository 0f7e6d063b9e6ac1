"""Checkpoints that others made, in the layouts people publish: what is sound passes, what is damaged is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import open_checkpoint
from pipeline.verify.structure import check_structure
from pipeline.verify.verify import verify
from pipeline.vllm_env.worker import VllmWorker
from tests.conftest import skip_without_fp8_kernels
from tests.damage import both, drop, edit_config, put, rewrite, section

pytestmark = pytest.mark.vllm
Q = "model.language_model.layers.0.self_attn.q_proj"
A1 = "model.language_model.layers.1.self_attn"
SMALL = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja",
         "generation_config.json")  # fmt: skip

# What llm-compressor itself exports, a scheme each; Qwen's own FP8 (128 x 128 blocks) is laid out by hand.
MAKE = """
import json, shutil, sys, torch, transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
source, root, small = sys.argv[1], sys.argv[2], sys.argv[3:]
cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
rows = torch.randint(4, 200, (4, 24), generator=torch.Generator().manual_seed(0)).tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 24] * 4})
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(source)
ignore = ["re:.*lm_head", "re:visual.*", "re:model.visual.*"]
for name, scheme, kv in (("dynamic", "FP8_DYNAMIC", cache), ("static", "FP8", None),
                         ("int8", "W8A8", None), ("kv", None, cache)):
    reset_session()
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    more = {"kv_cache_scheme": kv} if kv else {}
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore, **more)
    oneshot(model=model, recipe=recipe, dataset=data, processor=tokenizer, max_seq_length=24, num_calibration_samples=4)
    model.save_pretrained(f"{root}/{name}", save_compressed=True, max_shard_size="1GB")
shutil.copytree(f"{root}/dynamic", f"{root}/qwen")
made, plain = {}, []
for name, tensor in load_file(f"{root}/source.safetensors").items():
    if ".layers." not in name or not name.endswith("_proj.weight") or "visual" in name:
        made[name] = tensor
        plain += [name.removesuffix(".weight")] if name.endswith(".weight") else []
        continue
    rows, columns = tensor.shape
    high, wide = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(high * 128, wide * 128)
    padded[:rows, :columns] = tensor.float()
    blocks = padded.view(high, 128, wide, 128)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-8) / 448
    codes = (blocks / scale[:, None, :, None]).view(high * 128, wide * 128)[:rows, :columns]
    made[name] = codes.to(torch.float8_e4m3fn).contiguous()
    made[name + "_scale_inv"] = scale.to(torch.bfloat16)
save_file(made, f"{root}/qwen/model.safetensors", metadata={"format": "pt"})
config = json.load(open(f"{source}/config.json"))
config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                                 "weight_block_size": [128, 128], "modules_to_not_convert": plain}
json.dump(config, open(f"{root}/qwen/config.json", "w"))
for name in ("dynamic", "static", "int8", "kv", "qwen"):
    for file in small:
        shutil.copyfile(f"{source}/{file}", f"{root}/{name}/{file}")
"""


@pytest.fixture(scope="module")
def made(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's model, and what others make of it, each in one shard with an index."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("third party")
    source = demo_model
    tensors = {name: t for shard in source.glob("*.safetensors") for name, t in load_file(shard).items()}
    save_file(tensors, root / "source.safetensors")
    small = [name for name in SMALL if (source / name).exists()]
    done = subprocess.run([sys.executable, "-c", MAKE, source, root, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("dynamic", "static", "int8", "kv", "qwen"):
        names = load_file(root / name / "model.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        (root / name / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"source": source, **{path.name: path for path in root.iterdir() if path.is_dir()}}


@pytest.mark.parametrize("name", ["dynamic", "static", "int8", "kv", "qwen", "source"])
def test_sound_checkpoints_of_others_pass(name: str, made: dict[str, Path], worker: VllmWorker) -> None:
    assert check_structure(made[name]).passed
    if name == "qwen":
        skip_without_fp8_kernels(worker.environment)
    report = verify(made[name], open_checkpoint(made["source"]), "load", worker, contents=True)
    assert report.passed and report.proven_in_vllm and report.level == "load", report.problems
    unknown = name in ("int8", "kv", "qwen")
    assert unknown == any("is not known here: files, scales, numbers" in note for note in report.notes)
    promised = name in ("dynamic", "kv")
    assert promised == any("memoryless_minmax" in note for note in report.notes)
    assert promised != any("would run at KV scale 1.0" in note for note in report.notes)
    if name in ("qwen", "static"):
        assert any("42 weights dequantized: within 10% of the source's" in line for line in report.checked)


def scaled(name: str, factor: float) -> Callable[[Path], None]:
    """Multiply a BF16 or F32 tensor."""

    def change(out: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(out / "model.safetensors")
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return change


def no_list(out: Path) -> None:
    edit_config(out, lambda config: config["quantization_config"].pop("modules_to_not_convert"))


def lose(out: Path) -> None:
    """Take a weight out of its shard and the index."""
    from safetensors.torch import load_file, save_file

    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop(f"{Q}.weight", None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    for path in out.glob("*.index.json"):
        index = json.loads(path.read_text())
        del index["weight_map"][f"{Q}.weight"]
        path.write_text(json.dumps(index))


# which, what is done to it, a sentence, and who says it: the files alone, the files beside the source, or vLLM
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "a block's scale is NaN": (
        "qwen", scaled(f"{Q}.weight_scale_inv", float("nan")), "weight_scale_inv: 4 scale(s) are not finite", "files"),
    "a block's scale is lost": ("qwen", drop(f"{Q}.weight_scale_inv"), f"{Q}.weight: codes without a scale", "files"),
    "a weight is lost": (
        "qwen", drop(f"{Q}.weight"), f"{Q}.weight_scale_inv: there is no weight that it scales", "files"),
    "a weight and its scale are lost": (
        "qwen", both(drop(f"{Q}.weight"), drop(f"{Q}.weight_scale_inv")), "it is lost, and there are no", "source"),
    "a weight of an unquantized model is lost": ("source", lose, "has no self_attn.q_proj.weight", "files"),
    "a weight is zeros in F16": (
        "qwen",
        lambda out: rewrite(out, lambda t: t.update(
            {f"{Q}.weight": ({**t[f"{Q}.weight"][0], "dtype": "F16"}, b"\0\0" * len(t[f"{Q}.weight"][1]))})),
        f"{Q}.weight: it holds other numbers than the source's, rounded to F16", "source"),
    "nothing ignored": ("qwen", no_list, "BF16 weights that vLLM casts to FP8", "vLLM"),
    "a block's scale doubled": (
        "qwen", scaled(f"{Q}.weight_scale_inv", 2.0), "for it is 100% away from the source", "source"),
    "a static scale doubled": (
        "static", scaled(f"{Q}.weight_scale", 2.0), "for it is 100% away from the source", "source"),
    "a norm changed": (
        "static", scaled("model.language_model.norm.weight", 3.0), "it was to stay as it is, but its bytes", "source"),
    "int8 codes without a scale": ("int8", drop(f"{Q}.weight_scale"), f"{Q}.weight: codes without a scale", "files"),
    "KV scales alone, lost": (
        "kv", both(drop(f"{A1}.k_scale"), drop(f"{A1}.v_scale")), "in 1 of 6 layers, although the config", "files"),
    "k_scale lost": ("dynamic", drop(f"{A1}.k_scale"), "vLLM will run its keys at scale 1.0", "vLLM"),
    "KV scale 1.0": (
        "dynamic", both(put(f"{A1}.k_scale", 1.0), put(f"{A1}.v_scale", 1.0)), "v_scale are both 1.0", "files"),
    "rotations": (
        "dynamic", lambda out: section(out, transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "quantization_config.transform_config: vLLM would apply it", "files"),
    "a group of another format": (
        "dynamic",
        lambda out: edit_config(out, lambda config: [group.update(format="nvfp4-pack-quantized") for group in
                                                     config["quantization_config"]["config_groups"].values()]),
        "a group's format is 'nvfp4-pack-quantized'", "files"),
    "no tokenizer": ("dynamic", lambda out: (out / "tokenizer.json").unlink(), "there is no tokenizer", "files"),
    "a tensor twice": (
        "dynamic",
        lambda out: rewrite(out, lambda tensors: tensors.update(
            {"visual.blocks.0.norm1.weight": tensors["model.visual.blocks.0.norm1.weight"]})),
        "both fill this parameter of vLLM's", "vLLM"),
    "codes, and no word of them": (
        "qwen", lambda out: edit_config(out, lambda config: config.pop("quantization_config")),
        "vLLM takes the checkpoint for unquantized", "files"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damaged_checkpoints_of_others_are_named(
    name: str, made: dict[str, Path], worker: VllmWorker, tmp_path: Path
) -> None:
    which, damage, sentence, by = DAMAGE[name]
    if name == "nothing ignored":  # of blocks of FP8, which vLLM has to load to see it
        skip_without_fp8_kernels(worker.environment)
    out = shutil.copytree(made[which], tmp_path / "out")
    damage(out)
    if by == "vLLM":
        report = verify(out, None, "load", worker)
    else:
        report = check_structure(out, open_checkpoint(made["source"]) if by == "source" else None, contents=True)
    assert any(sentence in problem for problem in report.problems), report.problems
    assert not report.proven_in_vllm


def test_scales_without_a_scheme_are_tried_with_an_fp8_cache(
    made: dict[str, Path], worker: VllmWorker, tmp_path: Path
) -> None:
    """Nothing promises the cache, but who serves it with fp8 uses these scales."""
    out = shutil.copytree(made["dynamic"], tmp_path / "out")
    section(out, kv_cache_scheme=None)
    report = verify(out, None, "load", worker)
    assert report.passed and list(report.vllm["loads"]) == ["auto", "fp8"]
    assert any("it uses them only with --kv-cache-dtype fp8" in note for note in report.notes)
    assert not any("no KV scales" in note for note in report.notes)
    drop(f"{A1}.k_scale")(out)
    report = verify(out, None, "load", worker)
    assert any("with --kv-cache-dtype fp8: attention of 1 layer" in problem for problem in report.problems)


@pytest.mark.usefixtures("fp8_kernels")
def test_a_layout_that_is_not_known_is_generated_from(made: dict[str, Path], worker: VllmWorker) -> None:
    report = verify(made["qwen"], open_checkpoint(made["source"]), "generate", worker)
    assert report.passed and report.level == "generate", (report.problems, report.notes)
    assert 0.9 < report.vllm["generated"]["auto"]["perplexity_ratio"] < 1.05


def test_the_words_of_a_structural_check_alone(made: dict[str, Path]) -> None:
    """Without vLLM nothing is claimed of a layout that is not known."""
    report = check_structure(made["qwen"], open_checkpoint(made["source"]), contents=True)
    assert report.passed and not report.proven_in_vllm
    assert any("says vLLM's load check alone" in note for note in report.notes)
