"""What headers, config and captions tell is said by the plan, before any work: refused, or done without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import SourceError, open_checkpoint
from pipeline.plan.plan import Plan, make_plan
from pipeline.recipe import recipe
from tests.conftest import CALIBRATED, all_tensors, make_plain_checkpoint, read_shard, write_shard

DATA_FREE = "model: {{source: '{source}'}}\noutput: '{output}'\nbackend: llmcompressor\nscheme: fp8_dynamic\n"


def data_free(source: Path, kv_cache: str = "none") -> Plan:
    text = DATA_FREE.format(source=source, output=source.parent / "out") + f"kv_cache: {kv_cache}\n"
    return make_plan(recipe.parse(text), open_checkpoint(source))


def calibrated(source: Path, captions: Path, samples: int = 2, template: str = "raw") -> Plan:
    text = CALIBRATED.format(source=source, output=source.parent / "out", backend="modelopt", scheme="fp8",
                             captions=captions, samples=samples)  # fmt: skip
    return make_plan(recipe.parse(text, overrides=[f"calibration.template={template}"]), open_checkpoint(source))


def write_captions(directory: Path, *lines: str) -> Path:
    path = directory / "captions.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def llama(small_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model("llama"), tmp_path / "source"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def add_tensors(source: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Put tensors into a checkpoint's last shard."""
    path = sorted(source.glob("*.safetensors"))[-1]
    header, data = read_shard(path)
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_shard(path, header, data)
    index = source / "model.safetensors.index.json"
    if index.exists():
        edit(index, lambda value: value["weight_map"].update(dict.fromkeys(tensors, path.name)))


ONE = ("F32", [1], b"\0\0\x80?")


@pytest.mark.parametrize("name", ["k_scale", "k_proj.k_scale", "attn.v_scale", "v_proj.output_scale", "q_scale"])
def test_left_over_cache_scales_are_dropped_with_a_note(name: str, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    first, second = (f"model.layers.{layer}.self_attn.{name}" for layer in range(2))
    add_tensors(source, {first: ONE, second: ONE})
    plan = data_free(source)
    assert {plan.actions[each].action for each in (first, second)} == {"drop"} and first not in plan.outputs
    (note,) = (text for text in plan.warnings if "KV scales" in text)
    assert note.startswith(f"2 KV scales left over in the source are dropped, first {first}")


def test_results_without_the_left_over_cache_scales_verify(llama: Path, convert: Any, tmp_path: Path) -> None:
    clean = shutil.copytree(llama, tmp_path / "clean")
    add_tensors(llama, {f"model.layers.{layer}.self_attn.{key}_scale": ONE for layer in range(3) for key in "kv"})
    notes = calibrated(llama, write_captions(tmp_path, "A red boat.", "Two dogs.")).warnings
    assert any("calibration measures new ones" in text for text in notes)
    made, expected = (all_tensors(convert(each, "llmcompressor", f"out-{each.name}")) for each in (llama, clean))
    assert made == expected, "the scales are those that the run measured"


def test_other_scales_beside_plain_weights_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("weight_scale", "input_scale", "weight_scale_inv")):
        source = make_plain_checkpoint(tmp_path / str(number))
        whole = f"model.layers.0.self_attn.q_proj.{name}"
        add_tensors(source, {whole: ONE})
        with pytest.raises(SourceError, match=f"{whole}: a scale is left over beside a BF16 weight, 1 in all; if the"):
            data_free(source)


def add_token(source: Path, content: str, special: bool) -> None:
    def change(value: dict[str, Any]) -> None:
        for number in range(70):
            text = content if number == 69 else f"<seg{number}>"
            value["added_tokens"].append(
                {"id": 261 + number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": special}
            )  # fmt: skip

    edit(source / "tokenizer.json", change)


def test_a_token_beyond_the_embedding(llama: Path, tmp_path: Path) -> None:
    captions = write_captions(tmp_path, "A cat.", "A <mark> dog.")
    add_token(llama, "<mark>", special=False)
    with pytest.raises(
        SourceError,
        match=r"embed_tokens.weight: it has 320 rows, and the tokenizer makes token 330 \(<mark>\) in caption 2 \('A <",
    ):
        calibrated(llama, captions)


def test_special_tokens_in_captions_are_noted_by_number(llama: Path, tmp_path: Path) -> None:
    captions = write_captions(tmp_path, "A cat.", "", "A dog.", "A <image> dog.", "Two </s> ends.")
    for template in ("raw", "chat"):
        plan = calibrated(llama, captions, 4, template)
        (note,) = (text for text in plan.warnings if "special tokens" in text)
        assert note.startswith("special tokens written in captions are encoded as plain text: 2 of 4 captions, first")
        assert "caption 4, with <image>: 'A <image> dog.'" in note
        assert plan.calibration is not None and plan.calibration.batches.highest < 260, "and no token is one"


def test_a_calibration_set_of_a_few_tokens_is_noted(llama: Path, tmp_path: Path, captions: Path) -> None:
    few = calibrated(llama, write_captions(tmp_path, "A cat.", "A dog.")).warnings
    assert any(text.startswith("calibration runs on 12 tokens (2 captions)") for text in few)
    assert not any("calibration runs on" in text for text in calibrated(llama, captions, 64).warnings)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"]])
def test_a_class_that_calibration_cannot_run(architectures: Any, llama: Path, captions: Path) -> None:
    edit(llama / "config.json", lambda config: config.update(architectures=architectures))
    words = "no class 'NoSuchModel'" if architectures else r'no class in architectures.*add "architectures": \["Llama'
    with pytest.raises(SourceError, match=words):
        calibrated(llama, captions)
    assert any("names no architectures" in text for text in data_free(llama).warnings) == (not architectures)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_the_attention_of_a_fine_tune_is_not_needed(
    key: str, small_model: Callable[[str], Path], convert: Any, tmp_path: Path
) -> None:
    clean = small_model("qwen2_5_vl")
    source = Path(shutil.copytree(clean, tmp_path / "source"))

    def change(config: dict[str, Any]) -> None:
        for part in (config, config["text_config"], config["vision_config"]):
            part[key] = "flash_attention_2"

    edit(source / "config.json", change)
    made, expected = convert(source, "modelopt", "made"), convert(clean, "modelopt", "expected")
    assert all_tensors(made) == all_tensors(expected)
    assert json.loads((made / "config.json").read_text())[key] == "flash_attention_2", "what the source says stays"
