"""Calibrated runs on small models: what the scales are, what moves nothing, what is refused, what is reported."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import hub
from pipeline.errors import PipelineError, UsageError
from pipeline.formats.kv_scales import bf16_up, cache_scale
from pipeline.plan.plan import make_plan
from pipeline.recipe import recipe
from tests.conftest import (
    CALIBRATED,
    SCHEMES,
    SENTENCES,
    all_tensors,
    assert_one_clear_line,
    damaged,
    make_plain_checkpoint,
    read_shard,
    value,
    weight_files,
    write_shard,
)
from tests.warm import Warm


def events(output: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output / "quantize" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def true_ranges(source: Path, text: str) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """Largest keys, values and queries by layer and inputs by linear module, from the whole model in memory."""
    import torch
    import transformers
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    wanted = recipe.parse(text)
    plan = make_plan(wanted, hub.resolve(str(source), None))
    assert plan.calibration is not None
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(source, dtype=torch.bfloat16).eval()
    seen: dict[int, dict[str, float]] = {}
    inputs: dict[str, float] = {}

    def look(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        row = seen.setdefault(module.layer_idx, {"q": 0.0, "k": 0.0, "v": 0.0})
        for key, states in (("q", q), ("k", k), ("v", v)):
            row[key] = max(row[key], float(states.float().abs().max()))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, *args, **kwargs)

    AttentionInterface.register("test_look", look)
    model.set_attn_implementation("test_look")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(_m: Any, args: Any, name: str = name) -> None:
                inputs[name] = max(inputs.get(name, 0.0), float(args[0].float().abs().max()))

            module.register_forward_pre_hook(note)
    torch.set_num_threads(plan.threads)
    device = plan.calibration.device.kind
    model.to(device)
    with torch.no_grad():
        for batch in plan.calibration.batches.batches:
            ids = torch.tensor(batch.ids, dtype=torch.long, device=device).view(batch.rows, -1)
            model(input_ids=ids, use_cache=False)
    return seen, inputs


@pytest.mark.parametrize("backend", ["modelopt", "llmcompressor"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "qwen3_moe", "phi3"])
def test_scales_are_the_true_ranges(
    name: str, backend: str, small_model: Callable[[str], Path], convert: Callable[..., Path], captions: Path
) -> None:
    source = small_model(name)
    output = convert(source, backend)
    text = CALIBRATED.format(
        source=source, output="x", backend=backend, scheme=SCHEMES[backend], captions=captions, samples=20
    )
    seen, inputs = true_ranges(source, text)
    tensors = all_tensors(output)
    found = {name: entry for name, entry in tensors.items() if name.endswith((".k_scale", ".v_scale", ".q_scale"))}
    assert len(found) == 3 * len(seen)
    for tensor, entry in found.items():
        layer, key = int(tensor.split(".layers.")[1].split(".")[0]), tensor[-7]
        assert entry[0] == "BF16" and entry[1] == (() if backend == "modelopt" else (1,))
        assert value(entry) == cache_scale(seen[layer][key]), tensor
    if backend == "modelopt":
        probabilities = [value(entry) for tensor, entry in tensors.items() if tensor.endswith(".attn.prob_scale")]
        assert probabilities == [0.0022430419921875] * len(seen)
        checked = 0
        for tensor, entry in tensors.items():
            if tensor.endswith(".input_scale") and ".experts." not in tensor:
                last = tensor.removesuffix(".input_scale").rpartition("layers.")[2]
                (true,) = [
                    amax
                    for module, amax in inputs.items()
                    if module.endswith(f"layers.{last}") and "vision" not in module and "visual" not in module
                ]
                assert abs(value(entry) - true / 448) <= true / 448 * 1e-6
                checked += 1
        assert checked >= 9


def test_what_is_fused_shares_a_scale_and_is_rounded_once(
    small_model: Callable[[str], Path], convert: Callable[..., Path]
) -> None:
    import torch

    source = small_model("qwen2_5_vl")
    before, after = all_tensors(source), all_tensors(convert(source, "modelopt"))
    for layer in range(3):
        for parent, parts in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            names = [f"model.layers.{layer}.{parent}.{part}" for part in parts]
            assert len({after[f"{name}.weight_scale"][2] for name in names}) == 1
            weights = {n: torch.frombuffer(bytearray(before[f"{n}.weight"][2]), dtype=torch.bfloat16) for n in names}
            largest = max(float(weight.abs().max()) for weight in weights.values())
            scale = torch.tensor(bf16_up(largest / 448))
            for name, weight in weights.items():
                assert after[f"{name}.weight_scale"][2] == scale.numpy().tobytes()
                codes = (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)
                assert after[f"{name}.weight"][2] == codes.numpy().tobytes()


@pytest.mark.parametrize("backend", ["modelopt", "llmcompressor"])
def test_the_order_of_captions_changes_nothing(
    backend: str, small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    shuffled = SENTENCES[:]
    random.Random(4).shuffle(shuffled)
    other = tmp_path / "shuffled.txt"
    other.write_text("\n".join(shuffled))
    source = small_model("qwen3")
    assert same(convert(source, backend, "a"), convert(source, backend, "b", captions=other))


def same(a: Path, b: Path) -> bool:
    """All tensors and configs."""
    left, right = weight_files(a), weight_files(b)
    names = [n for n in left if n.endswith((".safetensors", "config.json", ".index.json"))]
    return names == [n for n in right if n in names] and all(left[n] == right[n] for n in names)


def test_fp8_dynamic_weights_are_those_of_the_data_free_path(
    small_model: Callable[[str], Path], convert: Callable[..., Path]
) -> None:
    for name in ("qwen2_5_vl", "qwen3_vl_moe"):
        source = small_model(name)
        with_scales = all_tensors(convert(source, "llmcompressor", f"{name}-kv"))
        without = all_tensors(convert(source, "llmcompressor", f"{name}-none", "kv_cache: none\n"))
        extra = {n for n in with_scales if n not in without}
        assert {n: with_scales[n] for n in without} == without
        assert all(n.endswith(("k_scale", "v_scale", "q_scale")) for n in extra) and len(extra) == 9


@pytest.mark.parametrize("place", ["host", "file"])
def test_where_hidden_states_wait_changes_nothing(
    place: str, small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    source = small_model("gemma3_text")
    auto = convert(source, "modelopt", "auto")
    work = tmp_path / "work"
    work.mkdir()
    there = convert(
        source, "modelopt", place, overrides=[f"runtime.hidden_states={place}", f"runtime.work_directory={work}"]
    )
    assert same(auto, there)
    assert list(work.iterdir()) == [], "scratch files must not stay"
    assert not list(there.rglob("*hidden*"))
    assert events(there, "skeleton")[0]["place"] == place


def test_reads_forwards_and_events(
    small_model: Callable[[str], Path], convert: Callable[..., Path], quantize: Any, tmp_path: Path, capsys: Any
) -> None:
    source = small_model("qwen3_vl")
    output = convert(source, "modelopt")
    text = capsys.readouterr().out
    report = json.loads((output / "quantize" / "calibration.json").read_text())
    batches = report["batches"]
    assert f"3 layers: 33 weights read once, {3 * batches['batches']} layer forwards" in text
    assert batches["samples"] == 20 and "computed_over_real_tokens" not in batches
    layers = events(output, "layer")
    assert [event["index"] for event in layers] == [0, 1, 2]
    for event in layers:
        for stage in ("read", "load", "forward", "quantize", "write"):
            assert event[stage][1] >= event[stage][0] > 1e9
        assert event["tokens"] == batches["tokens"] and event["tokens_per_s"] > 0 and event["rss_bytes"] > 1e8
    reads = Counter(event["tensor"] for event in events(output, "piece"))
    assert not any(".layers." in name and "visual" not in name for name in reads)
    rows = {row["layer"]: row for row in json.loads((output / "quantize" / "layers.json").read_text())}
    assert rows["model.language_model.layers.1"]["forward_s"] > 0
    done = quantize("trace", output, "-o", tmp_path / "trace.json")
    assert done.returncode == 0
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"read", "load", "forward", "quantize", "write"} <= {event.get("cat") for event in trace}
    card = (output / "README.md").read_text()
    assert "--kv-cache-dtype fp8" in card and "20 captions" in card and str(source) not in card


def test_experts_without_tokens_have_scales(small_model: Callable[[str], Path], convert: Callable[..., Path]) -> None:
    """Two captions of a few tokens reach few experts; the report counts, and every scale is usable."""
    source = small_model("qwen3_vl_moe")
    output = convert(source, "modelopt", samples=1)
    report = json.loads((output / "quantize" / "calibration.json").read_text())
    counts = [tokens for layer in report["layers"] for tokens in layer["tokens_of_experts"].values()]
    assert len(counts) == 3 and all(len(tokens) == 8 for tokens in counts)
    assert all(sum(tokens) == 2 * report["batches"]["tokens"] for tokens in counts)
    assert any("experts in 3 layers" in line and "share the amax of their input" in line for line in report["findings"])
    tensors = all_tensors(output)
    for layer in range(3):
        block = f"model.language_model.layers.{layer}.mlp.experts"
        for expert in range(8):
            for part in ("gate_proj", "up_proj", "down_proj"):
                assert 0 < value(tensors[f"{block}.{expert}.{part}.weight_scale"]) < 1
                assert 0 < value(tensors[f"{block}.{expert}.{part}.input_scale"]) < 1
            pair = {tensors[f"{block}.{expert}.{part}.weight_scale"][2] for part in ("gate_proj", "up_proj")}
            assert len(pair) == 1
        assert len({tensors[f"{block}.{e}.down_proj.input_scale"][2] for e in range(8)}) == 1


def test_ignored_modules_stay_and_get_no_scale(
    small_model: Callable[[str], Path], convert: Callable[..., Path]
) -> None:
    source = small_model("qwen3")
    before = all_tensors(source)
    for backend in ("modelopt", "llmcompressor"):
        after = all_tensors(
            convert(source, backend, backend, "ignore: ['re:.*down_proj', 'model.layers.1.self_attn']\n")
        )
        for name, entry in before.items():
            if "down_proj" in name or "layers.1.self_attn" in name:
                assert after[name] == entry
        assert "model.layers.1.self_attn.k_scale" in after, "the cache of an unquantized attention is FP8 all the same"
        assert not any(n.endswith("_scale") and ("down_proj" in n or "layers.1.self_attn.q_proj" in n) for n in after)


def test_other_dtypes_run_in_bf16(
    small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(small_model("llama"), source)
    for path in source.glob("*.safetensors"):
        save_file({k: v.to(torch.float16) for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    for backend in ("modelopt", "llmcompressor"):
        after = all_tensors(convert(source, backend, backend))
        assert "weights in F16 run in BF16 while amax is collected" in capsys.readouterr().out
        assert after["model.norm.weight"][0] == "F16"
        assert after["model.layers.0.mlp.up_proj.weight"][0] == "F8_E4M3"


def test_all_of_the_first_layer_may_be_ignored(
    small_model: Callable[[str], Path], convert: Callable[..., Path]
) -> None:
    for backend in ("modelopt", "llmcompressor"):
        tensors = all_tensors(convert(small_model("qwen3"), backend, backend, "ignore: [model.layers.0]\n"))
        assert tensors["model.layers.0.mlp.up_proj.weight"][0] == "BF16"
        assert tensors["model.layers.1.mlp.up_proj.weight"][0] == "F8_E4M3"
        assert "model.layers.0.self_attn.k_scale" in tensors


def test_fused_experts_may_be_ignored(small_model: Callable[[str], Path], convert: Callable[..., Path]) -> None:
    for backend in ("modelopt", "llmcompressor"):
        tensors = all_tensors(
            convert(small_model("qwen3_vl_moe"), backend, backend, "ignore: ['*.experts.*']\n", samples=4)
        )
        assert tensors["model.language_model.layers.0.mlp.experts.down_proj"][0] == "BF16"


def test_leftovers_of_old_checkpoints_are_copied(
    small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(small_model("llama"), source)
    path = sorted(source.glob("*.safetensors"))[-1]
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path), name: torch.ones(8)}, path, metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = path.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    for backend in ("modelopt", "llmcompressor"):
        assert all_tensors(convert(source, backend, backend))[name][0] == "F32"


def test_equalized_biases_keep_their_dtype(
    small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path, warm: Warm
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(small_model("qwen2_5_vl"), source)
    for path in source.glob("*.safetensors"):
        tensors = {name: tensor.to(torch.float32) for name, tensor in load_file(path).items()}
        for name, tensor in tensors.items():
            if ".v_proj." in name:
                tensor *= 2.0**-10
            if "o_proj.weight" in name:
                tensor *= 2.0**10
        save_file(tensors, path, metadata={"format": "pt"})
    output = convert(source, "modelopt")
    before, after = all_tensors(source), all_tensors(output)
    name = "model.layers.1.self_attn.v_proj.bias"
    assert after[name][0] == "F32" and after[name] != before[name]
    done = warm("verify", output, "--source", source, "--level", "structure")
    assert done.returncode == 0, done.stdout


def test_the_work_directory_is_the_users(
    small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    (work / "out.hidden").mkdir(parents=True)
    (work / "out.hidden" / "thesis.txt").write_text("mine")
    (work / "hidden-00001.bin").write_text("mine")
    convert(small_model("llama"), "llmcompressor", overrides=[f"runtime.work_directory={work}"])
    assert sorted(p.name for p in work.rglob("*")) == ["hidden-00001.bin", "out.hidden", "thesis.txt"]
    for place in (tmp_path / "b", tmp_path / "b.partial" / "x", small_model("llama") / "w"):
        with pytest.raises(UsageError, match=r"runtime.work_directory: "):
            convert(small_model("llama"), "llmcompressor", "b", overrides=[f"runtime.work_directory={place}"])


def test_hidden_states_that_cannot_be_saved_do_not_end_a_run(
    small_model: Callable[[str], Path], convert: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import errno

    from pipeline.stream import hidden, layers

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layers, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(hidden, "sync_directory", full)
    output = convert(small_model("llama"), "llmcompressor")
    assert "hidden states could not be saved (No space left on device)" in capsys.readouterr().out
    assert len(events(output, "hidden_not_saved")) == 2 and not list(output.rglob("hidden-*"))


# --- what is refused ---------------------------------------------------------------------------------


def poison(which: str, pattern: bytes) -> Callable[[str, bytearray], None]:
    def change(name: str, data: bytearray) -> None:
        if name == which:
            data[:] = pattern * (len(data) // len(pattern))

    return change


@pytest.mark.parametrize("backend", ["modelopt", "llmcompressor"])
def test_a_weight_that_is_not_finite(
    backend: str, small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = damaged(small_model("qwen3"), tmp_path / "source", poison(name, b"\xc0\x7f"))
    with pytest.raises(PipelineError, match=f"{name}: NaN or Inf"):
        convert(source, backend)
    assert not (tmp_path / "out").exists()


def test_zero_weights_get_a_usable_scale_and_a_note(
    small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.2.self_attn.v_proj"
    source = damaged(small_model("qwen3"), tmp_path / "source", poison(f"{name}.weight", b"\x00\x00"))
    for backend in ("modelopt", "llmcompressor"):
        output = convert(source, backend, backend)
        tensors = all_tensors(output)
        assert value(tensors["model.layers.2.self_attn.v_scale"]) == 1.0
        findings = json.loads((output / "quantize" / "calibration.json").read_text())["findings"]
        assert "model.layers.2.self_attn: the values are zero throughout; their scale is 1.0" in findings
    with pytest.raises(
        PipelineError, match=r"self_attn.[vo]_proj: the (weight|input) reaches 0.0, which gives no scale"
    ):
        convert(source, "modelopt", "exact", "backend_options: {exact: true}\n")


def test_an_expert_of_zeros(small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.3.{part}_proj" for part in ("gate", "up", "down")]
    zero = {f"{name}.weight" for name in names}
    source = damaged(
        small_model("qwen3_moe"), tmp_path / "source", lambda n, d: poison(n, b"\0\0")(n, d) if n in zero else None
    )
    tensors = all_tensors(convert(source, "modelopt", samples=4))
    for name in names:
        assert value(tensors[f"{name}.weight_scale"]) == 1.0 and not any(tensors[f"{name}.weight"][2])


def test_activations_that_overflow_name_their_layer(
    small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = damaged(small_model("llama"), tmp_path / "source", poison(name, b"\x00\x7f"))  # 1.7e38, finite
    with pytest.raises(
        PipelineError,
        match=r"model.layers.1: what it computes is not finite|model.layers.1: an activation is not finite",
    ):
        convert(source, "modelopt")


def test_a_tokenizer_of_another_model(
    small_model: Callable[[str], Path], convert: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(small_model("llama"), source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        token: i + (9000 if i > 3 else 0) for token, i in tokenizer["model"]["vocab"].items()
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        PipelineError, match=r"embed_tokens.weight: it has 320 rows.*the tokenizer belongs to another model"
    ):
        convert(source, "modelopt")


def test_no_attention_no_cache(tmp_path: Path, captions: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    for path in source.glob("*.safetensors"):
        header, data = read_shard(path)
        header = {name.replace("k_proj", "key"): entry for name, entry in header.items()}
        write_shard(path, header, data)
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("k_proj", "key"))
    text = CALIBRATED.format(
        source=source,
        output=tmp_path / "out",
        backend="llmcompressor",
        scheme="fp8_dynamic",
        captions=captions,
        samples=4,
    )
    with pytest.raises(UsageError, match=r"no attention with a k_proj or qkv_proj was found in model.layers"):
        make_plan(recipe.parse(text), hub.resolve(str(source), None))


def test_wishes_that_do_not_fit_the_machine(
    small_model: Callable[[str], Path], captions: Path, warm: Warm, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        CALIBRATED.format(source=small_model("llama"), output=tmp_path / "out", backend="modelopt", scheme="fp8",
                      captions=captions, samples=24)
    )  # fmt: skip
    done = warm(path, "runtime.device=cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert_one_clear_line(done, 2, "runtime.device: cuda", "use device: cpu, or auto")
    assert_one_clear_line(
        warm(path, "runtime.hidden_states=device", "runtime.device=cpu"), 2, "there is no GPU in this run"
    )
    assert_one_clear_line(warm(path, "calibration.samples=9999"), 2, "calibration.samples")
    done = warm("plan", path, "runtime.device=cpu")
    assert done.returncode == 0, done.stderr
    assert "calibration: 24 captions" in done.stdout and "layers run on CPU" in done.stdout
    told = json.loads(warm("plan", path, "--json").stdout)["calibration"]
    assert told["samples"] == 24 and told["forwards"] == 3 * told["batches"]
    assert not (tmp_path / "out.partial").exists()
