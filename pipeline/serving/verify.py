"""The structural check of a checkpoint: what can be known without vLLM.

Every finding is a sentence about what is wrong. `contents` reads the tensors themselves; without it only
headers, config and scales are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.source import Checkpoint, SourceError, Tensor, open_checkpoint
from pipeline.journal import JOURNAL
from pipeline.model.selection import Selection, expert_modules, head_is_tied, select

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
    _check_ignore(result, section, report)
    if source is not None:
        _check_accounts(result, source, section, report)
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


def _ignored(module: str, patterns: list[str]) -> bool:
    """As compressed-tensors and vLLM match: a literal name, or ``re:`` from the start of the name."""
    return any(re.match(p[3:], module) if p.startswith("re:") else p == module for p in patterns)


def _check_ignore(result: Checkpoint, section: dict[str, Any], report: Report) -> None:
    patterns = [str(pattern) for pattern in section.get("ignore") or []]
    quantized = [name.removesuffix(".weight") for name, tensor in result.tensors.items() if tensor.dtype == FP8]
    for module in quantized:
        if _ignored(module, patterns):
            report.problems.append(f"{module}: it is FP8, but the config ignores it: vLLM would load codes as weights")
    try:
        selection = select(result)
    except SourceError as error:
        report.problems.append(str(error))
        return
    plain = 0
    for name, choice in selection.choices.items():
        tensor = result.tensors[name]
        if choice.role in ("embedding", "norm") or tensor.dtype == FP8 or len(tensor.shape) != 2:
            continue
        if not name.endswith(".weight"):
            continue
        plain += 1
        module = name.removesuffix(".weight")
        if not _ignored(module, patterns):
            report.problems.append(
                f"{module}: {tensor.dtype}, but the config does not ignore it: vLLM would cast it to FP8 with a scale "
                "that nobody set"
            )
    modules = {name.rpartition(".")[0] for name in result.tensors} | {"lm_head"}
    for pattern in patterns:
        if not any(_ignored(module, [pattern]) for module in modules):
            report.problems.append(f"quantization_config.ignore: {pattern!r} matches nothing in this checkpoint")
    report.checked.append(f"{plain} plain linear weights: the config ignores each, and no FP8 weight")


def _check_config(result: Checkpoint, source: Checkpoint, report: Report) -> None:
    stripped = {key: value for key, value in result.config.items() if key != "quantization_config"}
    if stripped != source.config:
        changed = sorted(k for k in {*stripped, *source.config} if stripped.get(k) != source.config.get(k))
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


def _check_accounts(result: Checkpoint, source: Checkpoint, section: dict[str, Any], report: Report) -> None:
    patterns = [str(pattern) for pattern in section.get("ignore") or []]
    selection = select(source)
    expected: set[str] = set()
    copied = quantized = 0
    for name, tensor in source.tensors.items():
        role = selection.choices[name].role
        found = result.tensors.get(name)
        if found is not None and (found.dtype, found.shape) == (tensor.dtype, tensor.shape):
            expected.add(name)
            copied += 1
            if role == "linear" and not _ignored(name.removesuffix(".weight"), patterns):
                report.problems.append(f"{name}: a linear layer of the language model that was not quantized")
            continue
        if role == "head" and found is None and head_is_tied(source.config):
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
    journal = result.root / JOURNAL
    if not journal.exists():
        report.checked.append("no hashes were recorded for this checkpoint")
        return
    count = 0
    try:
        entries = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()[1:]]
        pieces = [piece for entry in entries for piece in entry["pieces"]]
    except (ValueError, KeyError):
        report.problems.append(f"{JOURNAL}: it is damaged")
        return
    for name, offset, nbytes, sha256 in pieces:
        tensor = result.tensors.get(name)
        if tensor is None:
            report.problems.append(f"{name}: recorded by the run, absent here")
            continue
        digest = hashlib.sha256()
        for start in range(0, nbytes, CHUNK):
            digest.update(_read(result, tensor, offset - tensor.offset + start, min(CHUNK, nbytes - start)))
        if digest.hexdigest() != sha256:
            report.problems.append(f"{name}: its bytes are not those that the run wrote (SHA-256 differs)")
        count += nbytes
    report.checked.append(f"{count:,} bytes of tensors: SHA-256 as recorded by the run")


def _check_bytes(result: Checkpoint, source: Checkpoint, report: Report) -> None:
    same = 0
    for name, tensor in source.tensors.items():
        found = result.tensors.get(name)
        if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            continue
        for start in range(0, tensor.nbytes, CHUNK):
            count = min(CHUNK, tensor.nbytes - start)
            if _read(source, tensor, start, count) != _read(result, found, start, count):
                report.problems.append(f"{name}: it was to stay as it is, but its bytes differ from the source's")
                break
        same += 1
    report.checked.append(f"{same} tensors that stay as they are: byte for byte the source's")
