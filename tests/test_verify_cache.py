"""What the structural check says of damaged KV scales and static scales, for both methods."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.source import INDEX, open_checkpoint
from pipeline.verify.structure import check_structure, read_back
from tests.conftest import CALIBRATED, SCHEMES, SENTENCES
from tests.damage import SHARD, all_of, both, drop, edit_config, flip_a_bit, put, rename, rewrite, section

L0, L1 = "model.layers.0.self_attn", "model.layers.1.self_attn"


@pytest.fixture(scope="module")
def pairs(small_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A source, and what both backends make of it, in one shard."""
    from pipeline.recipe import recipe
    from pipeline.report.console import Console
    from pipeline.run import runner

    root = tmp_path_factory.mktemp("pairs")
    (root / "c.txt").write_text("\n".join(SENTENCES))
    made = {}
    for backend, scheme in SCHEMES.items():
        text = CALIBRATED.format(
            source=small_model("qwen2_5_vl"), output=root / backend, backend=backend, scheme=scheme,
            captions=root / "c.txt", samples=20,
        )  # fmt: skip
        runner.run(recipe.parse(text), Console())
        made[backend] = (small_model("qwen2_5_vl"), root / backend)
    return made


def old_config(out: Path, **values: Any) -> None:
    path = out / "hf_quant_config.json"
    config = json.loads(path.read_text())
    config["quantization"].update(values)
    path.write_text(json.dumps(config))


# backend, damage, sentence, whether the checkpoint alone shows it
Case = tuple[str, Callable[[Path], Any], str, bool]
DAMAGE: dict[str, Case] = {}
for _backend in SCHEMES:
    DAMAGE |= {
        f"{_backend}: scales lost in one layer": (
            _backend,
            both(drop(f"{L1}.k_scale"), drop(f"{L1}.v_scale")),
            f"{L1}: no k_scale and v_scale, in 1 of 3 layers",
            True,
        ),
        f"{_backend}: all scales lost": (
            _backend,
            all_of(("k_scale", "v_scale", "q_scale", "prob_scale")),
            "in 3 of 3 layers",
            True,
        ),
        f"{_backend}: both 1.0": (
            _backend,
            both(put(f"{L0}.k_scale", 1.0), put(f"{L0}.v_scale", 1.0)),
            f"{L0}: k_scale and v_scale are both 1.0",
            True,
        ),
        f"{_backend}: zero": (
            _backend,
            put(f"{L0}.k_scale", 0.0),
            f"{L0}.k_scale: 0.0 is not finite and positive",
            True,
        ),
        f"{_backend}: NaN": (_backend, put(f"{L0}.v_scale", float("nan")), f"{L0}.v_scale: nan is not", True),
        f"{_backend}: negative": (_backend, put(f"{L0}.q_scale", -0.5), f"{L0}.q_scale: -0.5 is not", True),
        f"{_backend}: a name vLLM crashes on": (
            _backend,
            rename(f"{L0}.q_scale", f"{L0}.q_proj.q_scale"),
            f"{L0}.q_proj.q_scale: vLLM loads no KV-cache scale of this name",
            True,
        ),
        f"{_backend}: no scheme": (
            _backend,
            lambda o: section(o, kv_cache_scheme=None),
            "the config has no kv_cache_scheme",
            True,
        ),
        f"{_backend}: another scheme": (
            _backend,
            lambda o: section(o, kv_cache_scheme={"num_bits": 4, "type": "int"}),
            "is no FP8 scheme",
            True,
        ),
        f"{_backend}: a bit of a scale": (
            _backend,
            flip_a_bit(f"{L0}.k_scale"),
            f"{L0}.k_scale: its bytes are not",
            True,
        ),
    }
Q = f"{L0}.q_proj"
DAMAGE |= {
    "input scale lost": ("modelopt", drop(f"{Q}.input_scale"), f"{Q}.weight: FP8 values without an input_scale", True),
    "weight scale lost": (
        "modelopt",
        drop(f"{Q}.weight_scale"),
        f"{Q}.weight: FP8 values without a weight_scale",
        True,
    ),
    "input scale zero": ("modelopt", put(f"{Q}.input_scale", 0.0), "not finite and positive, first 0.0", True),
    "an input scale where none belongs": (
        "llmcompressor",
        lambda o: rewrite(
            o, lambda t: t.update({f"{Q}.input_scale": ({"dtype": "F32", "shape": []}, b"\0\0\x80\x3f")})
        ),
        "a static input scale, but the config says that inputs are dynamic",
        True,
    ),
    "prob scale under compressed-tensors": (
        "llmcompressor",
        lambda o: rewrite(
            o, lambda t: t.update({f"{L0}.attn.prob_scale": ({"dtype": "BF16", "shape": [1]}, b"\x80\x3f")})
        ),
        "vLLM loads no KV-cache scale of this name here",
        True,
    ),
    "another algorithm": ("modelopt", lambda o: section(o, quant_algo="NVFP4"), "quant_algo is 'NVFP4', not FP8", True),
    "dynamic inputs": ("modelopt", lambda o: section(o, config_groups={}), "FP8 with static per-tensor scales", True),
    "vision not ignored": (
        "modelopt",
        lambda o: section(o, ignore=["lm_head"]),
        "visual.blocks.0.attn.proj: BF16",
        True,
    ),
    "an ignore that matches nothing": (
        "modelopt",
        lambda o: section(o, ignore=["*visual*", "*vision_tower*", "lm_head"]),
        "'*vision_tower*' matches nothing",
        True,
    ),
    "an ignore of FP8": (
        "modelopt",
        lambda o: section(o, ignore=["*visual*", "lm_head", "*q_proj"]),
        "q_proj: it is FP8, but the config",
        True,
    ),
    "two configs that differ": (
        "modelopt",
        lambda o: old_config(o, kv_cache_quant_algo=None),
        "hf_quant_config.json: it says something else",
        True,
    ),
    "an old config that is no JSON": (
        "modelopt",
        lambda o: (o / "hf_quant_config.json").write_text("{"),
        "hf_quant_config.json: this is not JSON",
        True,
    ),
    "a weight scale that clips": (
        "modelopt",
        both(
            put(f"{Q}.weight_scale", 1e-6),
            lambda o: (o / "quantize" / "journal.jsonl").write_text('{"identity": {}}\n'),
        ),
        f"{Q}.weight_scale: not what the source's",
        False,
    ),
    "a bit of a bias": ("modelopt", flip_a_bit(f"{Q}.bias"), f"{Q}.bias: it was to stay as it is", False),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named(name: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    backend, damage, sentence, alone = DAMAGE[name]
    source, out = pairs[backend]
    target = shutil.copytree(out, tmp_path / "damaged")
    damage(target)
    report = check_structure(target, open_checkpoint(source), contents=True)
    assert any(sentence in problem for problem in report.problems), report.problems
    if alone:
        report = check_structure(target, contents=True)
        assert any(sentence in problem for problem in report.problems), report.problems


@pytest.mark.parametrize("backend", list(SCHEMES))
def test_sound_results_pass_with_their_contents(backend: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    source, out = pairs[backend]
    for given in (None, open_checkpoint(source)):
        report = check_structure(out, given, contents=True)
        assert report.passed, report.problems
        assert report.notes == []
    kinds = "(k, v, q, prob)" if backend == "modelopt" else "(k, v, q)"
    assert f"3 attention layers: finite, positive KV-cache scales {kinds}" in report.checked


@pytest.mark.parametrize("backend", list(SCHEMES))
def test_a_copy_that_is_laid_out_anew_is_the_same(
    backend: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Two shards, another order, other header bytes: the hashes are of tensors, not of places in a file."""
    from safetensors.torch import load_file, save_file

    source, out = pairs[backend]
    target = shutil.copytree(out, tmp_path / "copy")
    tensors = load_file(target / SHARD)
    names = sorted(tensors, reverse=True)
    (target / SHARD).unlink()
    where = {name: f"model-0000{1 + (n % 2)}-of-00002.safetensors" for n, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == shard}, target / shard, metadata={"format": "pt"})
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for given in (None, open_checkpoint(source)):
        report = check_structure(target, given, contents=True)
        assert report.passed, report.problems
        assert any("SHA-256 as recorded by the run" in line for line in report.checked)


def test_every_byte_is_read_back(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """As the gate does beside vLLM: a bit that turned over after it was hashed, in what stays and in what is cast."""
    target = shutil.copytree(pairs["modelopt"][1], tmp_path / "copy")
    assert read_back(open_checkpoint(target), threading.Event()).passed
    data = bytearray((target / SHARD).read_bytes())
    for name in ("visual.blocks.0.attn.qkv.weight", f"{Q}.weight"):
        data[open_checkpoint(target).tensors[name].offset + 11] ^= 4
    (target / SHARD).write_bytes(data)
    found = read_back(open_checkpoint(target), threading.Event()).problems
    sentence = "its bytes are not those that the run wrote (SHA-256 differs)"
    assert sorted(found) == [f"{Q}.weight: {sentence}", f"visual.blocks.0.attn.qkv.weight: {sentence}"]


def test_what_modelopts_own_layout_means_for_vllm_is_noted(
    small_model: Callable[[str], Path], convert: Callable[..., Path]
) -> None:
    """Exact mode passes, and the notes say what vLLM will do with it."""
    out = convert(small_model("qwen2_5_vl"), "modelopt", more="backend_options: {exact: true}\n")
    report = check_structure(out, open_checkpoint(small_model("qwen2_5_vl")), contents=True)
    assert report.passed
    notes = "\n".join(report.notes)
    assert "groups that vLLM fuses (q/k/v, gate/up) have different weight scales" in notes
    assert "KV-cache scales are F32: vLLM rounds them to BF16 with a warning each" in notes
    assert "vLLM 0.24.0 was seen to refuse it" in notes
    assert "there is no q_scale: vLLM uses 1.0 for it" in notes and "there is no prob_scale" in notes


@pytest.mark.parametrize("backend", list(SCHEMES))
@pytest.mark.parametrize(("byte", "fine"), [(lambda b: b ^ 1, True), (lambda b: 0x7F, False), (lambda b: b ^ 8, False)])
def test_what_others_made_may_be_one_rounding_away(
    byte: Callable[[int], int], fine: bool, backend: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Without a journal of ours a checkpoint may come from a GPU, whose kernels round otherwise: by one step."""
    source, out = pairs[backend]
    target = shutil.copytree(out, tmp_path / "other")
    shutil.rmtree(target / "quantize")

    def change(tensors: Any) -> None:
        entry, raw = tensors[f"{Q}.weight"]
        place = next(i for i, code in enumerate(raw) if 16 < code < 0x70)
        tensors[f"{Q}.weight"] = (entry, raw[:place] + bytes([byte(raw[place])]) + raw[place + 1 :])

    rewrite(target, change)
    report = check_structure(target, open_checkpoint(source), contents=True)
    assert report.passed is fine, report.problems
    if fine:
        assert any("but 1 made elsewhere and one rounding apart" in line for line in report.checked)
    else:
        assert any(f"{Q}.weight: not what the source's" in problem for problem in report.problems)


# --- other people's layouts ----------------------------------------------------------------------------


def others(out: Path, target: Path) -> Path:
    """A copy without the records of our runs, as someone else would have made it."""
    shutil.copytree(out, target)
    shutil.rmtree(target / "quantize")
    return target


def legacy(out: Path) -> None:
    edit_config(out, lambda c: c.pop("quantization_config"))


def nested(out: Path) -> None:
    old = json.loads((out / "hf_quant_config.json").read_text())
    edit_config(out, lambda c: c.update(quantization_config={"quant_method": "modelopt", **old}))
    (out / "hf_quant_config.json").unlink()


def static(out: Path) -> None:
    """compressed-tensors' scheme FP8, from a ModelOpt result: the same tensors, another config."""

    def change(config: Any) -> None:
        section = config["quantization_config"]
        part = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        groups = {"group_0": {"targets": ["Linear"], "weights": part, "input_activations": part}}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups,
            "ignore": ["lm_head", "re:.*visual.*"], "kv_cache_scheme": section["kv_cache_scheme"],
        }  # fmt: skip

    edit_config(out, change)
    (out / "hf_quant_config.json").unlink()
    rewrite(out, lambda t: [t.pop(name) for name in list(t) if name.endswith(".prob_scale")])


def a_head_each(out: Path) -> None:
    def change(tensors: Any) -> None:
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            tensors[name] = ({"dtype": "BF16", "shape": [2, 1, 1]}, tensors[name][1] * 2)

    rewrite(out, change)


def names_of_transformers(out: Path) -> None:
    edit_config(
        out,
        lambda c: c["quantization_config"].update(
            ignore=[
                "lm_head",
                *(f"model.{name}" for name in c["quantization_config"]["ignore"] if name.startswith("visual.")),
            ]
        ),
    )


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """All scales of a name under another one."""

    def change(tensors: Any) -> None:
        for name in [name for name in tensors if name.endswith(old)]:
            tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return lambda out: rewrite(out, change)


def one_for_both(out: Path) -> None:
    rewrite(out, lambda t: [t.pop(name) for name in list(t) if name.endswith(".v_scale")])
    renamed(".k_scale", ".kv_scale")(out)


def weights_alone(out: Path) -> None:
    edit_config(
        out, lambda c: [g.update(input_activations=None) for g in c["quantization_config"]["config_groups"].values()]
    )


@pytest.mark.parametrize(
    ("backend", "change"),
    [("modelopt", legacy), ("modelopt", nested), ("modelopt", static), ("llmcompressor", a_head_each),
     ("llmcompressor", names_of_transformers),
     ("llmcompressor", lambda o: section(o, ignore=["re:.*lm_head", "re:visual.*", "re:model.visual.*"])),
     ("llmcompressor", both(renamed(".k_scale", ".attn.k_scale"), renamed(".v_scale", ".attn.v_scale"))),
     ("llmcompressor", one_for_both), ("llmcompressor", weights_alone),
     ("modelopt", both(lambda o: edit_config(o, lambda c: c["quantization_config"].pop("config_groups")),
                       lambda o: (o / "hf_quant_config.json").unlink())),
     ("modelopt", both(lambda o: section(o, ignore=["lm_head", "visual", "absent"]),
                       lambda o: (o / "hf_quant_config.json").unlink()))],
    ids=["legacy file", "nested section", "static compressed-tensors", "a scale a head", "transformers' names", "idle",
         "vLLM's names of scales", "one scale for keys and values", "inputs stay", "no groups", "parts of names"],
)  # fmt: skip
def test_sound_layouts_of_others_pass(
    backend: str, change: Callable[[Path], Any], pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    target = others(pairs[backend][1], tmp_path / "other")
    change(target)
    for source in (None, open_checkpoint(pairs[backend][0])):
        report = check_structure(target, source, contents=True)
        assert report.passed, report.problems
    assert any("3 attention layers: finite, positive KV-cache scales" in line for line in report.checked)


def nan_codes(tensors: Any) -> None:
    entry, raw = tensors[f"{Q}.weight"]
    tensors[f"{Q}.weight"] = (entry, raw[:7] + b"\x7f" + raw[8:])


def edit_header(out: Path, metadata: Any, encoding: str = "utf-8") -> None:
    raw = (out / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {**json.loads(raw[8 : 8 + length]), **({"__metadata__": metadata} if metadata else {})}
    text = json.dumps(header).encode(encoding)
    (out / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


ODD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "NaN codes": ("modelopt", lambda o: rewrite(o, nan_codes), f"{Q}.weight: it holds values that are no finite"),
    "an absurd scale": ("llmcompressor", put(f"{L0}.k_scale", 1e30), "is out of the range that keys and values have"),
    "targets that are a number": (
        "llmcompressor",
        lambda o: edit_config(o, lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=5)),
        "they do not say that Linear weights are FP8",
    ),
    "a target that is no pattern": (
        "llmcompressor",
        lambda o: edit_config(
            o, lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["Other", "re:("])
        ),
        "ignore list: it cannot be checked, a value is not what it should be",
    ),
    "an input scale of two values": (
        "modelopt",
        lambda o: rewrite(
            o, lambda t: t.update({f"{L0}.o_proj.input_scale": ({"dtype": "BF16", "shape": [2]}, b"??" * 2)})
        ),
        "o_proj.input_scale: shape [2], one scale per tensor is []",
    ),
    "blocks of a number": (
        "llmcompressor", lambda o: section(o, quant_method="fp8", weight_block_size=128, activation_scheme="static"),
        "in all, although the config says that inputs are static",
    ),
    "a number of 5000 digits": (
        "modelopt", lambda o: (o / "config.json").write_text('{"a": ' + "9" * 5000 + "}"), "this is not JSON"),
    "a section that is text": ("llmcompressor", lambda o: edit_config(o, lambda c: c.update(quantization_config="fp8")),
        "config.json has no quantization_config"),
    "an embedding in FP8": (
        "llmcompressor",
        lambda o: rewrite(o, lambda t: t.update({
            "model.embed_tokens.weight": ({"dtype": "F8_E4M3", "shape": [320, 64]}, b"1" * 320 * 64),
            "model.embed_tokens.weight_scale": ({"dtype": "BF16", "shape": [320, 1]}, b"??" * 320)})),
        "an embedding in FP8, which vLLM would take for plain weights",
    ),
    "a zero that nothing promises": (
        "llmcompressor", both(put(f"{L0}.k_scale", 0.0), lambda o: section(o, kv_cache_scheme=None)),
        f"{L0}.k_scale: 0.0 is not finite and positive",
    ),
    "an ignore list of numbers": ("modelopt", lambda o: section(o, ignore=["lm_head", 5]), "5 is no module's name"),
    "a tokenizer with ids that are text": (
        "llmcompressor",
        lambda o: (o / "tokenizer.json").write_text('{"model": {"vocab": {"a": "b"}}}'),
        "tokenizer: it cannot be checked, a value is not what it should be",
    ),
    "sparsity": ("llmcompressor", lambda o: section(o, sparsity_config={"format": "dense"}), "sparsity_config: vLLM"),
    "an input scale that is far too small": (
        "modelopt", put(f"{L0}.o_proj.input_scale", 1e-14), "o_proj.input_scale: 1e-14 is out of the range"),
    "metadata of numbers": ("modelopt", lambda o: edit_header(o, {"format": 1}), "is no map from text to text"),
    "a header in UTF-16": ("modelopt", lambda o: edit_header(o, None, "utf-16"), "is not JSON in UTF-8"),
    "F64": (
        "modelopt",
        lambda o: rewrite(o, lambda t: t.update({f"{L0}.k_scale": ({"dtype": "F64", "shape": []}, b"\0" * 8)})),
        f"{L0}.k_scale: it is F64; scales are",
    ),
    "a section that is a list": ("modelopt", lambda o: edit_config(o, lambda c: c.update(quantization_config=[1])),
        "config.json has no quantization_config"),
    "an old file without content": (
        "modelopt", lambda o: (o / "hf_quant_config.json").write_text('{"quantization": null}'),
        "its quantization is no object",
    ),
    "only v_scale lost": (
        "modelopt", drop(f"{L1}.v_scale"),
        f"{L1}: no v_scale, in 1 of 3 layers, although the config promises an FP8 KV cache: vLLM would use k_scale for "
        "its values",
    ),
    "E5M2": (
        "llmcompressor",
        lambda o: rewrite(o, lambda t: t.update(
            {f"{Q}.weight": ({**t[f"{Q}.weight"][0], "dtype": "F8_E5M2"}, t[f"{Q}.weight"][1])})),
        f"{Q}.weight",
    ),
    "a row's scale under ModelOpt": (
        "modelopt",
        lambda o: rewrite(o, lambda t: t.update(
            {f"{Q}.weight_scale": ({"dtype": "F32", "shape": [64, 1]}, t[f"{Q}.weight_scale"][1] * 64)})),
        "one scale per tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ODD))
def test_odd_contents_are_sentences_and_not_tracebacks(
    name: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    backend, damage, sentence = ODD[name]
    source, out = pairs[backend]
    target = others(out, tmp_path / "odd")
    damage(target)
    for given in (None, open_checkpoint(source)):
        report = check_structure(target, given, contents=True)
        assert any(sentence in problem for problem in report.problems), report.problems


def test_what_is_not_quantized_is_said_to_be_so(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    report = check_structure(pairs["modelopt"][0])
    assert report.passed
    text = "not quantized: the weights are BF16, and config.json has no quantization_config"
    assert report.notes == [text] and report.as_json()["quantized"] is False
    odd = shutil.copytree(pairs["modelopt"][0], tmp_path / "odd")
    edit_config(odd, lambda config: config.update(quantization_config="fp8"))
    assert check_structure(odd).problems == ["config.json: its quantization_config is 'fp8', and no object"]


def test_a_tokenizer_with_too_many_ids(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Another model's is a problem; one that the source has as well, and many fine-tunes do, is noted."""
    source, out = (shutil.copytree(path, tmp_path / path.name) for path in pairs["modelopt"])
    target = others(out, tmp_path / "other")
    for root in (source, target):
        content = json.loads((root / "tokenizer.json").read_text())
        added = [{**content["added_tokens"][0], "id": 320 + n, "content": f"<more {n}>"} for n in range(10)]
        content["added_tokens"] += added
        (root / "tokenizer.json").write_text(json.dumps(content, indent=1 if root == target else 2))
    sentence = "tokenizer.json: its ids reach 329, the embedding has 320 rows"
    alone = check_structure(target)
    assert alone.problems == [f"{sentence}; it is another model's"]
    beside = check_structure(target, open_checkpoint(source))
    assert beside.passed and f"{sentence}; as in the source" in beside.notes
    content["added_tokens"] = content["added_tokens"][:-9]  # one, as Gemma 3 1B has it
    (target / "tokenizer.json").write_text(json.dumps(content))
    few = check_structure(target)
    assert few.passed and any("1 added tokens, as CodeLlama's and Gemma's makers left them" in n for n in few.notes)


def test_a_tokenizer_written_anew_by_its_library(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Older files have their merges as text; the library writes pairs, and keys that older ones lack."""
    from tokenizers import Tokenizer, models

    source, out = (shutil.copytree(path, tmp_path / path.name) for path in pairs["llmcompressor"])
    target = others(out, tmp_path / "other")
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, **{f"<{n}>": n for n in range(5, 320)}}
    Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")])).save(str(target / "tokenizer.json"))
    old = json.loads((target / "tokenizer.json").read_text())
    assert old["model"]["merges"] == [["a", "b"], ["ab", "c"]] and "ignore_merges" in old["model"]
    old["model"]["merges"] = ["a b", "ab c"]
    del old["model"]["ignore_merges"]
    (source / "tokenizer.json").write_text(json.dumps(old))
    report = check_structure(target, open_checkpoint(source))
    assert not [line for line in report.problems if "differs from the source's" in line], report.problems
    old["model"]["merges"] = ["a b", "b c"]
    (source / "tokenizer.json").write_text(json.dumps(old))
    assert "tokenizer.json: it differs from the source's" in check_structure(target, open_checkpoint(source)).problems
