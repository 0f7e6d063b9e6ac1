"""A scheme of its own, defined here alone: it converts and verifies without an edit anywhere else.

Data-free FP8 with one power-of-two scale per output row, kept as a vector; its section says ``quant_method: toy``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from pipeline import convert
from pipeline.backends import registry
from pipeline.backends.fp8 import NonFiniteWeight
from pipeline.checkpoint.source import open_checkpoint
from pipeline.errors import UsageError
from pipeline.formats import methods
from pipeline.formats.base import Format, Output, Requantized
from pipeline.model.selection import Selection
from pipeline.recipe import recipe as recipes
from pipeline.recipe.sections import Common, Section
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
    """E4M3 values and one power of two per row, in the weight's dtype."""
    amax = weight.float().abs().amax(1).clamp(min=2.0**-100)
    if not bool(amax.isfinite().all()):
        raise NonFiniteWeight(None)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448.0)) + headroom)
    return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale.to(weight.dtype)


class Toy:
    """The backend."""

    name = "toy"
    format = TOY
    needs_data = weights_need_data = False
    numerics = "the toy's"
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

    def load_libraries(self) -> None:
        return

    def quantizer(self, dtype: str) -> Callable[..., None]:
        def run(source: Any, values: Any, scales: Any, rows: int, columns: int) -> None:
            weight = torch.frombuffer(source, dtype=torch.bfloat16).view(rows, columns)
            made, scale = quantize(weight, self.headroom)
            torch.frombuffer(values, dtype=torch.uint8).copy_(made.view(torch.uint8).flatten())
            torch.frombuffer(scales, dtype=torch.bfloat16).copy_(scale)

        assert dtype == "BF16"
        return run


def requantize(
    weight: bytearray, dtype: str, rows: int, columns: int, stored: Mapping[str, tuple[str, bytes]], power: int
) -> Requantized:
    values, scale = quantize(torch.frombuffer(weight, dtype=torch.bfloat16).view(rows, columns), 0)
    return Requantized({
        "weight": values.view(torch.uint8).numpy().tobytes(),
        "weight_scale": scale.view(torch.uint8).numpy().tobytes(),
    })  # fmt: skip


@pytest.fixture
def toy() -> Iterator[None]:
    def make(recipe: Any) -> Any:
        return Toy(recipe.backend_options.headroom)

    scheme = registry.Scheme("toy", "pow2", make, TOY, requantize, Toy.numerics)
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
    assert made[name][0] == "F8_E4M3" and made[f"{name}_scale"][:2] == ("BF16", (96,))
    assert made["model.layers.2.mlp.up_proj.weight"] == before["model.layers.2.mlp.up_proj.weight"]
    raw = torch.frombuffer(bytearray(before[name][2]), dtype=torch.bfloat16).view(96, 64)
    values = torch.frombuffer(bytearray(made[name][2]), dtype=torch.float8_e4m3fn).view(96, 64).float()
    scale = torch.frombuffer(bytearray(made[f"{name}_scale"][2]), dtype=torch.bfloat16).float()
    assert float((values * scale[:, None] - raw.float()).abs().max()) < 0.1 / 8
    report = check_structure(outcome.output, open_checkpoint(source), contents=True)
    assert report.passed and any("quantized once more: the same bits" in line for line in report.checked)
    assert "powers of two" in (outcome.output / "README.md").read_text()


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
    assert "toy" in recipes.json_schema()["discriminator"]["mapping"]
    with pytest.raises(UsageError, match=r"backend_options.headrom: unknown key; did you mean headroom"):
        convert(asked(source, tmp_path / "c", backend_options={"headrom": 1}))
