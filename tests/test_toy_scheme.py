"""Schemes defined here alone: they convert and verify without an edit anywhere else.

The first is data-free: FP8 with one power-of-two scale per output row, kept as a vector in F32; its section says
``quant_method: toy``. The second is calibrated: per-tensor FP8 in compressed-tensors' words, with KV scales. The third
is no FP8 at all: weight-only INT8, data-free (vLLM takes weight-only integers only packed: it would not load this one).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from pipeline import convert
from pipeline.backends import registry
from pipeline.backends.attention import AttentionObserver, scale_tensors
from pipeline.backends.base import Observed
from pipeline.backends.fp8 import NonFiniteWeight
from pipeline.checkpoint.result import VERSIONS
from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import UsageError
from pipeline.formats import methods
from pipeline.formats.base import Format, Output, Requantized, every_name
from pipeline.formats.kv_scales import COMPRESSED_NAMES
from pipeline.model.selection import Selection
from pipeline.plan.plan import make_plan
from pipeline.recipe import recipe as recipes
from pipeline.recipe.sections import Common, Section
from pipeline.run.estimate import Work, rule
from pipeline.verify.structure import check_structure
from tests.conftest import all_tensors, damaged, make_plain_checkpoint

TOY = Format(
    "toy",
    {"num_bits": 8, "type": "float", "strategy": "row"},
    {"dynamic": True},
    static_inputs=False,
    granularity="channel",
    recognizes=lambda section: section.get("quant_method") == "toy",
    column=False,
    scale_dtype="F32",
)


class ToyOptions(Section):
    """``backend_options`` of toy."""

    headroom: int = 0


class ToyRecipe(Common):
    """FP8 with scales that are powers of two."""

    backend: Literal["toy"]
    scheme: Literal["pow2"]
    backend_options: ToyOptions = ToyOptions()


def quantize(weight: torch.Tensor, headroom: int) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values and one power of two per row."""
    amax = weight.float().abs().amax(1).clamp(min=2.0**-100)
    if not bool(amax.isfinite().all()):
        raise NonFiniteWeight(None)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448.0)) + headroom)
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


class Toy:
    """The backend."""

    name = "toy"
    format = TOY
    needs_data = weights_need_data = False
    tags: tuple[str, ...] = ("toy",)
    card = "Weights are FP8 with scales that are powers of two."
    expert_rule = "their weights give their scales"
    import_seconds, forward_cost = 0.0, 1.0

    def __init__(self, headroom: int) -> None:
        self.headroom = headroom

    def attention_outputs(self) -> tuple[Output, ...]:
        return ()

    def config_section(self, selection: Selection) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": dict(TOY.weights), "input_activations": dict(TOY.inputs)}
        return {"quant_method": "toy", "config_groups": {"all": group}, "ignore": list(selection.kept_linears)}

    def extra_files(self, checkpoint: Any, selection: Selection) -> dict[str, Any]:
        return {}

    def versions(self, dtypes: set[str]) -> dict[str, str]:
        return {"toy": "1"}

    def imports_torch(self, dtypes: set[str]) -> bool:
        return True

    def load_libraries(self) -> None:
        return

    def quantizer(self, dtype: str) -> Callable[..., None]:
        def run(source: Any, values: Any, scales: Any, rows: int, columns: int) -> None:
            weight = torch.frombuffer(source, dtype=torch.bfloat16).view(rows, columns)
            made, scale = quantize(weight, self.headroom)
            torch.frombuffer(values, dtype=torch.uint8).copy_(made.view(torch.uint8).flatten())
            torch.frombuffer(scales, dtype=torch.float32).copy_(scale)

        assert dtype == "BF16"
        return run


def requantize(
    weight: memoryview,
    dtype: str,
    rows: int,
    columns: int,
    stored: Mapping[str, tuple[str, bytes]],
    power: int,
    options: Mapping[str, Any],
) -> Requantized:
    source = torch.frombuffer(weight, dtype=torch.bfloat16).view(rows, columns)
    values, scale = quantize(source, options.get("headroom", 0))
    return Requantized({
        "weight": values.view(torch.uint8).numpy().tobytes(),
        "weight_scale": scale.view(torch.uint8).numpy().tobytes(),
    })  # fmt: skip


@pytest.fixture
def toy() -> Iterator[None]:
    def make(recipe: Any) -> Any:
        return Toy(recipe.backend_options.headroom)

    scheme = registry.Scheme("toy", "pow2", make, TOY, requantize, "the toy's")
    recipes.register("toy", ToyRecipe)
    methods.register(TOY)
    registry.register(scheme)
    yield
    registry.unregister(scheme)
    methods.unregister(TOY)
    recipes.unregister("toy")


def asked(source: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": {"source": str(source)}, "output": str(output), "backend": "toy", "scheme": "pow2",
        "kv_cache": "none", "verify": "structure", **more,
    }  # fmt: skip


def test_a_toy_scheme_converts_and_verifies(toy: None, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source", layers=3)
    outcome = convert(asked(source, tmp_path / "out", ignore=["model.layers.2"]), quiet=True)
    assert outcome.report is not None and outcome.report.passed, outcome.report
    made, before = all_tensors(outcome.output), all_tensors(source)
    name = "model.layers.0.mlp.up_proj.weight"
    assert made[name][0] == "F8_E4M3" and made[f"{name}_scale"][:2] == ("F32", (96,))
    assert made["model.layers.2.mlp.up_proj.weight"] == before["model.layers.2.mlp.up_proj.weight"]
    raw = torch.frombuffer(bytearray(before[name][2]), dtype=torch.bfloat16).view(96, 64)
    values = torch.frombuffer(bytearray(made[name][2]), dtype=torch.float8_e4m3fn).view(96, 64).float()
    scale = torch.frombuffer(bytearray(made[f"{name}_scale"][2]), dtype=torch.float32)
    assert float((values * scale[:, None] - raw.float()).abs().max()) < 0.1 / 8
    report = check_structure(outcome.output, open_checkpoint(source), contents=True)
    assert report.passed and any("quantized once more: the same bits" in line for line in report.checked)
    assert "powers of two" in (outcome.output / "README.md").read_text()
    assert json.loads((outcome.output / VERSIONS).read_text())["toy"] == "1"


def test_damage_to_it_is_found(toy: None, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    output = convert(asked(source, tmp_path / "out"), quiet=True).output

    def flip(name: str, part: bytearray) -> None:
        if name == "model.layers.1.self_attn.q_proj.weight":
            part[5] ^= 0x08

    report = check_structure(damaged(output, tmp_path / "bits", flip), open_checkpoint(source), contents=True)
    codes = {finding.code for finding in report.findings}
    assert {"requantized-differs", "hash-differs"} <= codes and not report.passed

    def lose(name: str, part: bytearray) -> None:
        if name.endswith("up_proj.weight_scale"):
            part[:] = bytes(len(part))

    report = check_structure(damaged(output, tmp_path / "zero", lose), open_checkpoint(source))
    assert "scale-not-finite" in {finding.code for finding in report.findings}, report.findings


def test_its_words_are_known_only_while_it_is_registered(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'toy' is not a backend; allowed: modelopt, llmcompressor"):
        convert(asked(tmp_path, tmp_path / "out"))


def test_its_options_and_its_schema_are_its_own(toy: None, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    first = convert(asked(source, tmp_path / "a"), quiet=True).output
    second = convert(asked(source, tmp_path / "b", backend_options={"headroom": 1}), quiet=True).output
    assert all_tensors(first) != all_tensors(second)
    for output in (first, second):  # the options of the run decide what its weights give when quantized once more
        report = check_structure(output, open_checkpoint(source), contents=True)
        assert report.passed and any("quantized once more: the same bits" in line for line in report.checked)
    assert "toy" in recipes.json_schema()["discriminator"]["mapping"]
    with pytest.raises(UsageError, match=r"backend_options.headrom: unknown key; did you mean headroom"):
        convert(asked(source, tmp_path / "c", backend_options={"headrom": 1}))


# --- a calibrated one --------------------------------------------------------------------------------

FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
PER_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def is_per_tensor(section: Mapping[str, Any]) -> bool:
    groups = section.get("config_groups") or {}
    return section.get("quant_method") == "compressed-tensors" and any(
        group["weights"]["strategy"] == "tensor" and group["input_activations"]["dynamic"] for group in groups.values()
    )


PER_TENSOR = Format(
    "compressed-tensors",
    FP8_TENSOR,
    PER_TOKEN,
    static_inputs=False,
    granularity="tensor",
    recognizes=is_per_tensor,
    cache=every_name(COMPRESSED_NAMES),
    scale_dtype="F32",
    section_format=("float-quantized",),
)


class PerTensorRecipe(Common):
    """FP8 with one scale per weight."""

    backend: Literal["observed"]
    scheme: Literal["fp8_tensor"]
    backend_options: Section = Section()
    calibrated_schemes: ClassVar[tuple[str, ...]] = ("fp8_tensor",)


def quantize_whole(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values and the amax over 448, in F32."""
    scale = weight.float().abs().amax() / 448.0
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


class PerTensor(Toy):
    """The backend: whole weights, and KV scales from the observer that every scheme can use."""

    name = "observed"
    format = PER_TENSOR
    needs_data = weights_need_data = True
    card = "Weights are FP8 with one scale each."

    def __init__(self, kv_cache: bool) -> None:
        self.kv_cache = kv_cache
        self.observer = AttentionObserver()

    def attention_outputs(self) -> tuple[Output, ...]:
        return COMPRESSED_NAMES.outputs() if self.kv_cache else ()

    def config_section(self, selection: Selection) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": FP8_TENSOR, "input_activations": PER_TOKEN}
        return {
            "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"all": group},
            "ignore": list(selection.kept_linears), "kv_cache_scheme": FP8_TENSOR if self.kv_cache else None,
        }  # fmt: skip

    def prepare(self, skeleton: Any, selection: Selection) -> None:
        self.observer.install(skeleton.model)

    def calibrate(self, layer: Any, forward: Callable[[], None], probe: Callable[[], Any]) -> Observed:
        forward()
        return Observed(attention=self.observer.take(layer.module))

    def finish(self, layer: Any, ranges: Observed) -> dict[str, Any]:
        made = {}
        for name, module in layer.linears.items():
            made[f"{name}.weight"], made[f"{name}.weight_scale"] = quantize_whole(module.weight.detach())
        return {**made, **(scale_tensors(layer.attention, ranges, COMPRESSED_NAMES) if self.kv_cache else {})}


def requantize_whole(
    weight: memoryview,
    dtype: str,
    rows: int,
    columns: int,
    stored: Mapping[str, tuple[str, bytes]],
    power: int,
    options: Mapping[str, Any],
) -> Requantized:
    values, scale = quantize_whole(torch.frombuffer(weight, dtype=torch.bfloat16).view(rows, columns))
    return Requantized({
        "weight": values.view(torch.uint8).numpy().tobytes(),
        "weight_scale": scale.numpy().tobytes(),
    })  # fmt: skip


@pytest.fixture
def observed() -> Iterator[None]:
    def make(recipe: Any) -> Any:
        return PerTensor(recipe.kv_cache == "fp8")

    scheme = registry.Scheme("observed", "fp8_tensor", make, PER_TENSOR, requantize_whole, "the toy's")
    recipes.register("observed", PerTensorRecipe)
    methods.register(PER_TENSOR)
    registry.register(scheme)
    yield
    registry.unregister(scheme)
    methods.unregister(PER_TENSOR)
    recipes.unregister("observed")


@pytest.mark.parametrize("kv_cache", ["fp8", "none"])
def test_a_calibrated_scheme_converts_and_verifies(
    kv_cache: str, observed: None, small_model: Callable[[str], Path], captions: Path, tmp_path: Path
) -> None:
    source = small_model("llama")
    wanted = asked(source, tmp_path / "out", backend="observed", scheme="fp8_tensor", kv_cache=kv_cache)
    with pytest.raises(UsageError, match="calibration: this key is missing; scheme: fp8_tensor"):
        convert(wanted)
    calibration = {"captions": str(captions), "samples": 8}
    outcome = convert({**wanted, "calibration": calibration, "runtime": {"device": "cpu"}}, quiet=True)
    assert outcome.report is not None and outcome.report.passed, outcome.report
    made = all_tensors(outcome.output)
    assert made["model.layers.0.mlp.up_proj.weight_scale"][:2] == ("F32", ())
    assert ("model.layers.0.self_attn.k_scale" in made) == (kv_cache == "fp8")
    report = check_structure(outcome.output, open_checkpoint(source), contents=True)
    assert report.passed and any("quantized once more: the same bits" in line for line in report.checked)

    def double(name: str, part: bytearray) -> None:
        if name.endswith("layers.1.mlp.up_proj.weight_scale"):
            part[:] = (2 * torch.frombuffer(part, dtype=torch.float32)).numpy().tobytes()

    report = check_structure(damaged(outcome.output, tmp_path / "double", double), open_checkpoint(source), True)
    assert "requantized-differs" in {finding.code for finding in report.findings} and not report.passed


def test_an_estimate_of_it_needs_no_table(
    observed: None, small_model: Callable[[str], Path], captions: Path, tmp_path: Path
) -> None:
    source = small_model("qwen3")
    wanted = asked(source, tmp_path / "out", backend="observed", scheme="fp8_tensor")
    parsed = recipes.parse(json.dumps({**wanted, "calibration": {"captions": str(captions), "samples": 9}}))
    parts = rule(Work.of(make_plan(parsed, open_checkpoint(source))))
    assert parts["imports"] == PerTensor.import_seconds and parts["forwards"] > 0


# --- one that is not FP8 -----------------------------------------------------------------------------

INT8_WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False, "symmetric": True}


def is_int8(section: Mapping[str, Any]) -> bool:
    groups = (section.get("config_groups") or {}).values()
    return section.get("quant_method") == "compressed-tensors" and all(g["weights"]["type"] == "int" for g in groups)


INT8 = Format(
    "compressed-tensors",
    INT8_WEIGHTS,
    {},  # weights alone
    static_inputs=False,
    granularity="channel",
    recognizes=is_int8,
    weight_dtype="I8",
    scale_dtype="F32",
    section_format=("int-quantized",),
    repeatable_elsewhere=frozenset(),  # others may take their scales otherwise
)


class Int8Recipe(Common):
    """INT8 weights, and nothing else."""

    backend: Literal["int8"]
    scheme: Literal["int8_channel"]
    kv_cache: Literal["fp8", "none"] = "none"
    backend_options: Section = Section()


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 values, and each row's amax over 127."""
    scale = weight.float().abs().amax(1).clamp(min=2.0**-100) / 127.0
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


class Int8(Toy):
    """The backend."""

    name = "int8"
    format = INT8
    card = "Weights are INT8."

    def config_section(self, selection: Selection) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": INT8_WEIGHTS, "input_activations": None, "format": "int-quantized"}
        return {
            "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"all": group},
            "ignore": list(selection.kept_linears),
        }  # fmt: skip

    def quantizer(self, dtype: str) -> Callable[..., None]:
        def run(source: Any, values: Any, scales: Any, rows: int, columns: int) -> None:
            made, scale = quantize_int8(torch.frombuffer(source, dtype=torch.bfloat16).view(rows, columns))
            torch.frombuffer(values, dtype=torch.int8).copy_(made.flatten())
            torch.frombuffer(scales, dtype=torch.float32).copy_(scale)

        return run


def requantize_int8(
    weight: memoryview,
    dtype: str,
    rows: int,
    columns: int,
    stored: Mapping[str, tuple[str, bytes]],
    power: int,
    options: Mapping[str, Any],
) -> Requantized:
    values, scale = quantize_int8(torch.frombuffer(weight, dtype=torch.bfloat16).view(rows, columns))
    return Requantized({"weight": values.numpy().tobytes(), "weight_scale": scale.numpy().tobytes()})


@pytest.fixture
def int8() -> Iterator[None]:
    scheme = registry.Scheme("int8", "int8_channel", lambda _: Int8(0), INT8, requantize_int8, "the toy's")
    recipes.register("int8", Int8Recipe)
    methods.register(INT8)
    registry.register(scheme)
    yield
    registry.unregister(scheme)
    methods.unregister(INT8)
    recipes.unregister("int8")


def test_a_scheme_that_is_not_fp8(int8: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    wanted = asked(source, tmp_path / "out", backend="int8", scheme="int8_channel")
    del wanted["kv_cache"]  # its recipe's default is none
    outcome = convert(wanted)
    assert outcome.report is not None and outcome.report.passed, outcome.report
    assert " tensors become INT8, " in capsys.readouterr().out
    assert any("INT8 weights: each has finite" in line for line in outcome.report.checked)
    made = all_tensors(outcome.output)
    assert made["model.layers.0.mlp.up_proj.weight"][0] == "I8"
    card = (outcome.output / "README.md").read_text()
    assert "INT8 version of" in card and "- int8\n" in card and "FP8" not in card.partition("```")[0]
    report = check_structure(outcome.output, open_checkpoint(source), contents=True)
    assert report.passed and any("quantized once more: the same bits" in line for line in report.checked)

    def flip(name: str, part: bytearray) -> None:
        if name == "model.layers.1.self_attn.q_proj.weight":
            part[5] ^= 0x08

    report = check_structure(damaged(outcome.output, tmp_path / "bits", flip), open_checkpoint(source), contents=True)
    assert {"requantized-differs", "hash-differs"} <= {finding.code for finding in report.findings}


def test_kv_scales_that_a_backend_does_not_make_are_not_promised(int8: None, toy: None, tmp_path: Path) -> None:
    source = make_plain_checkpoint(tmp_path / "source")
    wanted = {**asked(source, tmp_path / "out", backend="int8", scheme="int8_channel"), "kv_cache": "fp8"}
    with pytest.raises(UsageError, match=r"kv_cache: fp8: backend int8 makes no KV scales .*set kv_cache: none"):
        convert({**wanted, "calibration": {"captions": "embedded"}}, quiet=True)
    assert not (tmp_path / "out.partial").exists()
