"""Quantized weights of any role against the source, as the numbers that they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.source import open_checkpoint
from pipeline.formats.methods import method_of
from pipeline.model.ignore import IgnoreList
from pipeline.verify.accounts import check_accounts
from pipeline.verify.contents import check_bytes
from pipeline.verify.report import Report
from tests.conftest import make_plain_checkpoint

ARGS = {"num_bits": 8, "type": "float", "symmetric": True}
SECTION = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**ARGS, "strategy": "channel", "dynamic": False},
                                  "input_activations": {**ARGS, "strategy": "token", "dynamic": True}}},
}  # fmt: skip
Made = dict[str, torch.Tensor]


def fp8(w: torch.Tensor, amax: torch.Tensor, kind: torch.dtype = torch.float8_e4m3fn) -> Made:
    scale = amax / torch.finfo(kind).max
    return {"": (w / scale).to(kind), "_scale": scale}


def rows(w: torch.Tensor) -> torch.Tensor:
    return w.abs().flatten(1).amax(1).view(-1, *[1] * (w.dim() - 1))


def blocks(w: torch.Tensor) -> Made:
    made = torch.nn.functional.pad(w, (0, -w.shape[1] % 128, 0, -w.shape[0] % 128))
    scale = made.unfold(0, 128, 128).unfold(1, 128, 128).abs().amax((2, 3)) / 448
    wide = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
    return {"": (w / wide).to(torch.float8_e4m3fn), "_scale_inv": scale}


def int8(w: torch.Tensor) -> Made:
    return {"": (w / (rows(w) / 127)).round().to(torch.int8), "_scale": rows(w) / 127}


def asymmetric(w: torch.Tensor) -> Made:
    scale = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 255
    zero = (-128 - w.amin(1, keepdim=True) / scale).round()
    return {"": (w / scale + zero).round().clamp(-128, 127).to(torch.int8), "_scale": scale,
            "_zero_point": zero.to(torch.int8)}  # fmt: skip


def groups(w: torch.Tensor) -> Made:
    scale = w.view(w.shape[0], -1, 32).abs().amax(2) / 127
    return {"": (w / scale.repeat_interleave(32, 1)).round().to(torch.int8), "_scale": scale}


def bitsandbytes(w: torch.Tensor) -> Made:
    return {"": (w / rows(w) * 127).round().to(torch.int8), "SCB": rows(w).flatten()}


def packed(w: torch.Tensor) -> Made:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scale = w.view(w.shape[0], -1, 32).abs().amax(2) / 7
    values = (w / scale.repeat_interleave(32, 1)).round().to(torch.int8)
    return {"_packed": pack_to_int32(values, 4), "_scale": scale, "_shape": torch.tensor(w.shape)}


def fp4(w: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    return pack_fp4_to_uint8(FP4_E2M1_DATA.cast_to_fp4(w / scale.repeat_interleave(group, 1)).bfloat16())


def nvfp4(w: torch.Tensor, own: bool) -> Made:
    whole = w.abs().amax() / 6 / 448
    scale = (w.view(w.shape[0], -1, 16).abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    codes = fp4(w, scale.float() * whole, 16)
    if own:
        return {"": codes, "_scale": scale, "_scale_2": whole.view(())}
    return {"_packed": codes, "_scale": scale, "_global_scale": 1 / whole.view(1)}


def mxfp4(w: torch.Tensor) -> Made:
    power = (w.view(w.shape[0], -1, 32).abs().amax(2) / 6).log2().ceil()
    return {"_packed": fp4(w, 2**power, 32), "_scale": (power + 127).to(torch.uint8)}


MATRIX, KERNEL, STACK = (192, 160), (64, 3, 2, 14), (4, 64, 32)
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[torch.Tensor], Made]]] = {
    "per tensor": (MATRIX, lambda w: fp8(w, w.abs().amax())),
    "per channel": (MATRIX, lambda w: fp8(w, rows(w))),
    "in blocks": (MATRIX, blocks),
    "E5M2": (MATRIX, lambda w: fp8(w, rows(w), torch.float8_e5m2)),
    "a convolution": (KERNEL, lambda w: fp8(w, rows(w))),
    "a convolution, per tensor": (KERNEL, lambda w: fp8(w, w.abs().amax().view(1))),
    "fused experts": (STACK, lambda w: fp8(w, w.abs().amax(2, keepdim=True))),
    "INT8": (MATRIX, int8),
    "INT8, asymmetric": (MATRIX, asymmetric),
    "INT8, in groups": (MATRIX, groups),
    "bitsandbytes' INT8": (MATRIX, bitsandbytes),
    "INT4, packed": (MATRIX, packed),
    "NVFP4": (MATRIX, lambda w: nvfp4(w, False)),
    "ModelOpt's NVFP4": (MATRIX, lambda w: nvfp4(w, True)),
    "MXFP4": (MATRIX, mxfp4),
}
PLACES = ("visual.blocks.0.qkv.weight", "lm_head.weight", "projector.linear_1.weight", "mtp.fc.weight")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain_checkpoint(tmp_path_factory.mktemp("plain") / "source", shards=1)


def checked(plain: Path, tmp_path: Path, name: str, layout: str, factor: float) -> Report:
    """What is found of a checkpoint in which the tensor `name` is quantized, its scales `factor` times too large."""
    shape, quantize = LAYOUTS[layout]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05
    module, tensors = name.removesuffix(".weight"), load_file(plain / "model.safetensors")
    made = {f"{module}.{key}" if key.isupper() else name + key: value for key, value in quantize(weight).items()}
    made = {
        k: v + int(math.log2(factor)) if k.endswith("_scale") and v.dtype == torch.uint8  # exponents
        else v * factor if v.dtype == torch.float32 else v
        for k, v in made.items()
    }  # fmt: skip
    tensors.pop(name, None)
    config = json.loads((plain / "config.json").read_text())
    for directory, more in (("source", {name: weight.bfloat16()}), ("theirs", made)):
        (tmp_path / directory).mkdir(parents=True)
        save_file({**tensors, **more}, tmp_path / directory / "model.safetensors")
        section = {"quantization_config": SECTION} if directory == "theirs" else {}
        (tmp_path / directory / "config.json").write_text(json.dumps({**config, **section}))
    report = Report(str(tmp_path), None, False)
    source, theirs = (open_checkpoint(tmp_path / directory) for directory in ("source", "theirs"))
    said = check_bytes(theirs, source, method_of(SECTION), report)
    if not report.problems:
        assert "1 weights dequantized: within" in said
    return report


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_scales_of_weights_outside_the_language_model(layout: str, plain: Path, tmp_path: Path) -> None:
    sound = checked(plain, tmp_path / "sound", PLACES[0], layout, 1.0)
    assert sound.findings == []
    factor = 1 / 8 if layout == "NVFP4" else 8.0  # its second scale divides
    (found,) = checked(plain, tmp_path / "wrong", PLACES[0], layout, factor).findings
    assert (found.code, found.subject) == ("weight-far-from-source", PLACES[0])


@pytest.mark.parametrize("name", PLACES[1:])
def test_weights_of_other_roles(name: str, plain: Path, tmp_path: Path) -> None:
    assert checked(plain, tmp_path / "sound", name, "per channel", 1.0).findings == []
    (found,) = checked(plain, tmp_path / "wrong", name, "per channel", 2.0).findings
    assert (found.code, found.subject) == ("weight-far-from-source", name)


def test_a_scale_that_is_no_number(plain: Path, tmp_path: Path) -> None:
    (found,) = checked(plain, tmp_path, PLACES[0], "per tensor", math.nan).findings
    assert found.code == "weight-far-from-source"


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", PLACES[:2])
def test_a_third_partys_quantized_weight_is_accounted_for(name: str, layout: str, plain: Path, tmp_path: Path) -> None:
    checked(plain, tmp_path, name, layout, 1.0)
    source, theirs = (open_checkpoint(tmp_path / directory) for directory in ("source", "theirs"))
    for produced_here in (False, True):
        report = Report(str(tmp_path), None, produced_here)
        check_accounts(theirs, source, IgnoreList(["re:.*_proj", "lm_head"]), SECTION, method_of(SECTION), report)
        assert bool(report.problems) == produced_here, report.problems
