"""The structural check of a checkpoint: what can be known without vLLM.

Every finding is a sentence about what is wrong. `contents` reads the tensors themselves; without it only
headers, config and scales are read.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.backends.fp8 import NonFiniteWeight, transpose
from pipeline.backends.llmcompressor import FP8Dynamic
from pipeline.checkpoint.source import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, SourceError, Tensor, open_checkpoint
from pipeline.journal import JOURNAL, read_pieces
from pipeline.model.selection import IgnoreList, Selection, expert_modules, is_linear_shaped, select

CHUNK = 16 << 20
FP8 = "F8_E4M3"


@dataclass
class Report:
    """What was checked, and what is wrong."""

    checkpoint: str
    source: str | None
    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    proven_in_vllm: bool = False

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain data, as quantize/verify.json holds it."""
        return {
            "checkpoint": self.checkpoint,
            "source": self.source,
            "passed": self.passed,
            "checked": self.checked,
            "problems": self.problems,
            "proven_in_vllm": self.proven_in_vllm,
        }


def check_structure(directory: Path, source: Checkpoint | None = None, contents: bool = False) -> Report:
    """Check a quantized checkpoint.

    Args:
        directory: the checkpoint.
        source: what it was made from; every tensor of it must be accounted for.
        contents: also read every byte: against the hashes that the run recorded, and against the source.
    """
    report = Report(str(directory), source.label if source else None)
    try:
        result = open_checkpoint(directory)
    except SourceError as error:
        report.problems.append(str(error))
        return report
    report.checked.append(f"{len(result.shards)} shard(s): headers, lengths and index agree")
    section = result.config.get("quantization_config")
    if not isinstance(section, dict):
        report.problems.append("config.json has no quantization_config: vLLM will load the FP8 codes as plain weights")
        return report
    if section.get("quant_method") != "compressed-tensors":
        report.problems.append(
            f"quant_method {section.get('quant_method')!r} is not known to this version's structural check"
        )
        return report
    _check_scales(result, report)
    ignore = _check_section(section, report)
    _check_ignore(result, ignore, report)
    if source is not None:
        _check_accounts(result, source, ignore, report)
        _check_config(result, source, report)
    if contents:
        _check_hashes(result, report)
        if source is not None:
            _check_bytes(result, source, report)
    return report


# --- scales ------------------------------------------------------------------------------------------


def _check_scales(result: Checkpoint, report: Report) -> None:
    counted = 0
    for name, tensor in result.tensors.items():
        if name.endswith(".weight_scale"):
            weight = result.tensors.get(name.removesuffix("_scale"))
            if weight is None or weight.dtype != FP8:
                report.problems.append(f"{name}: there is no FP8 weight that it scales")
            continue
        if tensor.dtype != FP8:
            continue
        counted += 1
        scale = result.tensors.get(f"{name}_scale") if name.endswith(".weight") else None
        if scale is None:
            report.problems.append(f"{name}: FP8 codes without a weight_scale: vLLM would run them unscaled")
            continue
        expected = (tensor.shape[0], 1)
        if len(tensor.shape) != 2 or scale.shape != expected:
            report.problems.append(f"{scale.name}: shape {list(scale.shape)}, one scale a row is {list(expected)}")
            continue
        if bad := _bad_scales(result, scale):
            report.problems.append(f"{scale.name}: {len(bad)} scale(s) are not finite and positive, first {bad[0]}")
    if not counted:
        report.problems.append("there is no FP8 weight in this checkpoint")
    report.checked.append(f"{counted} FP8 weights: each has finite, positive scales of the right shape")


def _bad_scales(checkpoint: Checkpoint, tensor: Tensor) -> list[float]:
    """The values that are not finite and positive: as integers, those are the bit patterns from 1 to below Inf's."""
    formats = {"BF16": ("H", 0x7F80), "F16": ("H", 0x7C00), "F32": ("I", 0x7F800000)}
    if tensor.dtype not in formats:
        return [math.nan]
    code, infinity = formats[tensor.dtype]
    bits = array(code, _read(checkpoint, tensor, 0, tensor.nbytes))
    if bits and min(bits) > 0 and max(bits) < infinity:
        return []
    return [_as_float(value, tensor.dtype) for value in bits if not 0 < value < infinity]


def _as_float(bits: int, dtype: str) -> float:
    if dtype == "F16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16 if dtype == "BF16" else bits))[0])


def _read(checkpoint: Checkpoint, tensor: Tensor, start: int, count: int) -> bytes:
    path = checkpoint.shards[tensor.shard].path
    assert path is not None
    with path.open("rb") as file:
        return os.pread(file.fileno(), count, tensor.offset + start)


# --- config ------------------------------------------------------------------------------------------


def _check_section(section: dict[str, Any], report: Report) -> IgnoreList:
    """The parts of the section that vLLM reads: what a group quantizes, how, and what is ignored."""
    groups = section.get("config_groups")
    wanted = FP8Dynamic.groups()["group_0"]
    found = list(groups.values()) if isinstance(groups, dict) else []
    fits = [
        group
        for group in found
        if isinstance(group, dict)
        and "Linear" in (group.get("targets") or [])
        and all(_has(group.get(part), wanted[part]) for part in ("weights", "input_activations"))
    ]
    if not fits:
        report.problems.append(
            "quantization_config.config_groups: no group says that Linear weights are FP8 with a scale a row and "
            "activations FP8 per token: vLLM would read the scales wrongly"
        )
    if section.get("format") != "float-quantized":
        report.problems.append(f"quantization_config.format is {section.get('format')!r}, not float-quantized")
    entries = section.get("ignore") or []
    try:
        if not isinstance(entries, list):
            raise ValueError(f"{entries!r} is no list")
        return IgnoreList(entries)
    except ValueError as error:
        report.problems.append(f"quantization_config.ignore: {error}")
        return IgnoreList([])


def _has(part: Any, wanted: dict[str, Any]) -> bool:
    keys = ("num_bits", "type", "strategy", "dynamic", "symmetric")
    return isinstance(part, dict) and all(part.get(key) == wanted[key] for key in keys)


def _check_ignore(result: Checkpoint, ignore: IgnoreList, report: Report) -> None:
    try:
        selection = select(result)
    except SourceError as error:
        report.problems.append(str(error))
        return
    linears = {
        name.removesuffix(".weight"): tensor.dtype
        for name, tensor in result.tensors.items()
        if is_linear_shaped(tensor) and selection.choices[name].role != "embedding"
    }
    report.problems += ignore.problems(linears, {name.rpartition(".")[0] for name in result.tensors})
    plain = sum(dtype != FP8 for dtype in linears.values())
    report.checked.append(f"{plain} plain linear weights: the config ignores each, and no FP8 weight")


def _check_config(result: Checkpoint, source: Checkpoint, report: Report) -> None:
    ours, theirs = (
        {key: value for key, value in config.items() if key != "quantization_config"}
        for config in (result.config, source.config)
    )
    if ours != theirs:
        changed = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        report.problems.append(f"config.json differs from the source's in {', '.join(changed)}")
    for name in source.sidecars:
        path = result.root / name
        if name == "config.json":
            continue
        if not path.exists():
            report.problems.append(f"{name}: the source has it, the checkpoint does not")
        elif path.read_bytes() != (source.root / name).read_bytes():
            report.problems.append(f"{name}: it differs from the source's")
    report.checked.append(f"config and {len(source.sidecars) - 1} small files: as in the source")


# --- against the source ------------------------------------------------------------------------------


def _check_accounts(result: Checkpoint, source: Checkpoint, ignore: IgnoreList, report: Report) -> None:
    selection = select(source)
    expected: set[str] = set()
    copied = quantized = 0
    for name, tensor in source.tensors.items():
        role = selection.choices[name].role
        found = result.tensors.get(name)
        if found is not None and (found.dtype, found.shape) == (tensor.dtype, tensor.shape):
            expected.add(name)
            copied += 1
            if role == "linear" and name.removesuffix(".weight") not in ignore:
                report.problems.append(f"{name}: a linear layer of the language model that was not quantized")
            continue
        if role == "tied head" and found is None:
            continue
        if role not in ("linear", "experts"):
            what = "is lost" if found is None else f"became {found.dtype} {list(found.shape)}"
            report.problems.append(f"{name}: it {what}, but it belongs to what stays as it is")
            continue
        for module, rows, columns in _expected_modules(name, tensor, role, selection):
            weight = result.tensors.get(f"{module}.weight")
            expected.update((f"{module}.weight", f"{module}.weight_scale"))
            quantized += 1
            if weight is None:
                report.problems.append(f"{module}.weight: the source has it ({name}), the checkpoint does not")
            elif (weight.dtype, weight.shape) != (FP8, (rows, columns)):
                report.problems.append(
                    f"{module}.weight: {weight.dtype} {list(weight.shape)}, expected {FP8} {[rows, columns]}"
                )
    for name in result.tensors:
        if name not in expected:
            report.problems.append(f"{name}: the source has nothing that it could come from")
    report.checked.append(f"{len(source.tensors)} source tensors accounted for: {copied} kept, {quantized} in FP8")


def _expected_modules(name: str, tensor: Tensor, role: str, selection: Selection) -> Iterator[tuple[str, int, int]]:
    if role == "linear":
        yield name.removesuffix(".weight"), tensor.shape[0], tensor.shape[1]
        return
    block, _, kind = name.rpartition(".")
    for _, modules in expert_modules(block, kind, selection.expert_layouts[block]):
        yield from modules


# --- contents ----------------------------------------------------------------------------------------


def _check_hashes(result: Checkpoint, report: Report) -> None:
    try:
        pieces = read_pieces(result.root)
    except ValueError:
        report.problems.append(f"{JOURNAL}: it is damaged")
        return
    if pieces is None:
        report.checked.append("no hashes were recorded for this checkpoint")
        return
    covered: Counter[str] = Counter()
    for piece in pieces:
        tensor = result.tensors.get(piece.tensor)
        if tensor is None:
            report.problems.append(f"{piece.tensor}: recorded by the run, absent here")
            continue
        covered[piece.tensor] += piece.nbytes
        digest = hashlib.sha256()
        for start in range(0, piece.nbytes, CHUNK):
            count = min(CHUNK, piece.nbytes - start)
            digest.update(_read(result, tensor, piece.offset - tensor.offset + start, count))
        if digest.hexdigest() != piece.sha256:
            report.problems.append(f"{piece.tensor}: its bytes are not those that the run wrote (SHA-256 differs)")
    for name, tensor in result.tensors.items():
        if covered[name] != tensor.nbytes:
            report.problems.append(f"{name}: the run recorded hashes for {covered[name]} of {tensor.nbytes} bytes")
    report.checked.append(f"{sum(covered.values()):,} bytes of tensors: SHA-256 as recorded by the run")


def _check_bytes(result: Checkpoint, source: Checkpoint, report: Report) -> None:
    """What stays against the source, and what is quantized against the source quantized once more."""
    selection, same, again, other = select(source), 0, 0, 0
    ours = (result.root / JOURNAL).exists()
    for name, tensor in source.tensors.items():
        found, role = result.tensors.get(name), selection.choices[name].role
        if found is not None and (found.dtype, found.shape) == (tensor.dtype, tensor.shape):
            same += 1
            if not _equal(source, tensor, result, found):
                report.problems.append(f"{name}: it was to stay as it is, but its bytes differ from the source's")
        elif role in ("linear", "experts") and tensor.dtype in FLOAT_DTYPES:
            again += 1
            try:
                wrong = _requantize(source, tensor, result, role, selection)
            except NonFiniteWeight:
                report.problems.append(f"{name}: NaN or Inf in the source")
                continue
            if wrong and not ours:
                other += 1  # whoever made it may have used a GPU, whose kernels round otherwise
            elif wrong:
                report.problems.append(
                    f"{wrong}: not what the source's {name} gives when it is quantized (llm-compressor's numerics on a "
                    "CPU)"
                )
    report.checked.append(f"{same} tensors that stay as they are: byte for byte the source's")
    bits = f"the same bits but for {other}, made elsewhere" if other else "the same bits"
    report.checked.append(f"{again} source tensors quantized once more: {bits}")


def _equal(a: Checkpoint, tensor: Tensor, b: Checkpoint, other: Tensor) -> bool:
    starts = range(0, tensor.nbytes, CHUNK)
    sizes = [min(CHUNK, tensor.nbytes - start) for start in starts]
    return all(_read(a, tensor, s, n) == _read(b, other, s, n) for s, n in zip(starts, sizes, strict=True))


def _requantize(source: Checkpoint, tensor: Tensor, result: Checkpoint, role: str, selection: Selection) -> str | None:
    """The first output tensor whose bytes are not those of `tensor` quantized again; None if all are."""
    quantize, width = FP8Dynamic().quantizer(tensor.dtype), DTYPE_BYTES[tensor.dtype]
    modules = list(_expected_modules(tensor.name, tensor, role, selection))
    layout = selection.expert_layouts.get(tensor.name.rpartition(".")[0])
    each = len(modules) // layout.experts if layout else 1
    position = 0
    for first in range(0, len(modules), each):
        stacked = modules[first : first + each]
        rows, columns = sum(module[1] for module in stacked), stacked[0][2]
        turned = layout is not None and layout.transposed
        step = rows if turned else max(1, CHUNK // (columns * width))
        codes, scales = bytearray(rows * columns), bytearray(rows * width)
        for top in range(0, rows, step):
            count = min(step, rows - top)
            data = bytearray(_read(source, tensor, position, count * columns * width))
            position += len(data)
            if turned:
                flat, data = data, bytearray(len(data))
                transpose(flat, data, columns, rows, width)
            quantize(
                data,
                memoryview(codes)[top * columns : (top + count) * columns],
                memoryview(scales)[top * width : (top + count) * width],
                count,
                columns,
            )
        top = 0
        for module, height, _ in stacked:
            for suffix, made in (
                ("weight", codes[top * columns : (top + height) * columns]),
                ("weight_scale", scales[top * width : (top + height) * width]),
            ):
                found = result.tensors.get(f"{module}.{suffix}")
                if found is not None and _read(result, found, 0, found.nbytes) != made:
                    return f"{module}.{suffix}"
            top += height
    return None
