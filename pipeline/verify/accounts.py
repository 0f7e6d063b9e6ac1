"""Every source tensor accounted for in the result."""

from __future__ import annotations

import re
from typing import Any

from pipeline.checkpoint.source import FLOAT_DTYPES, Checkpoint, Tensor
from pipeline.formats.base import Format
from pipeline.formats.methods import ANY_SCALE, CACHE_SCALE, PACKED, is_cache_scale
from pipeline.model.ignore import IgnoreList
from pipeline.model.selection import expected_modules, select
from pipeline.verify.distance import OF_A_MODULE
from pipeline.verify.ignore_list import aliases, targeted
from pipeline.verify.report import Report


def check_accounts(
    result: Checkpoint,
    source: Checkpoint,
    ignore: IgnoreList,
    section: dict[str, Any] | None,
    method: Format | None,
    report: Report,
) -> str:
    """Hold every tensor of the source against what stands in its place, and every tensor here against the source."""
    selection = select(source)
    expected: set[str] = set()
    cast: list[str] = []
    copied = quantized = 0
    packed = _packed(result)

    def stays(module: str) -> bool:
        names = (module,) if report.produced_here else (module, *aliases(module))
        return any(name in ignore for name in names) or not targeted(module, section or {})

    for name, tensor in source.tensors.items():
        if is_cache_scale(tensor):  # those of the result have their own check; left over in a source they are dropped
            continue
        role = selection.choices[name].role
        found, owner = result.tensors.get(name), name.removesuffix(".weight")
        alike = found if found is not None and found.shape == tensor.shape else None
        kept = alike is not None and alike.dtype == tensor.dtype
        recast = found is not None and not report.produced_here and {found.dtype, tensor.dtype} <= {*FLOAT_DTYPES}
        if alike is not None and (kept or recast):
            expected.add(name)
            copied += 1
            if not kept:
                cast.append(name)
            if method is not None and role == "linear" and not stays(owner):
                text = f"{name}: a linear layer of the language model that was not quantized"
                report.add("linear-not-quantized", name, text)
            continue
        if role == "tied head" and found is None:
            continue
        names = {f"{owner}.{suffix}" for suffix in OF_A_MODULE}
        scaled = owner in packed and any(ANY_SCALE.match(each) for each in names & result.tensors.keys())
        whole = found is None or alike is not None or found.dtype == "U8"  # two values in a byte
        if role in ("outside", "head") and not report.produced_here and scaled and whole:
            expected |= names  # somebody quantized it, too; the contents say how well
            quantized += 1
            continue
        if role not in ("linear", "experts"):
            code, what = _outcome(found)
            report.add(code, name, f"{name}: it {what}, but it belongs to what stays as it is")
            continue
        if method is None:  # what its weights became may have other names and shapes
            plain = found is not None and found.dtype not in PACKED
            parts = (name, *(each for each, _, _ in expected_modules(name, tensor, role, selection)))
            if any(part in packed for part in parts) and not plain:
                quantized += 1
            else:
                code, what = _outcome(found)
                report.add(code, name, f"{name}: it {what}, and there are no codes in its place")
            continue
        for module, rows, columns in expected_modules(name, tensor, role, selection):
            weight = result.tensors.get(f"{module}.weight")
            expected.update((f"{module}.weight", f"{module}.weight_scale"))
            if method.static_inputs:
                expected.add(f"{module}.input_scale")
            quantized += 1
            if weight is None:
                text = f"{module}.weight: the source has it ({name}), the checkpoint does not"
                report.add("tensor-lost", f"{module}.weight", text)
            elif (weight.dtype, weight.shape) != (method.weight_dtype, (rows, columns)):
                wanted = f"{method.weight_dtype} {[rows, columns]}"
                text = f"{module}.weight: {weight.dtype} {list(weight.shape)}, expected {wanted}"
                report.add("tensor-changed", f"{module}.weight", text)
    for name in result.tensors if method is not None else ():
        if name not in expected and not CACHE_SCALE.search(name):  # those have their own check
            report.add("tensor-unexpected", name, f"{name}: the source has nothing that it could come from")
    if cast:
        dtype = result.tensors[cast[0]].dtype
        text = f"{cast[0]} is {dtype}, unlike the source's, {len(cast)} in all: rounded once more, or made wider"
        report.add("tensor-cast", cast[0], text)
    as_it_seems = "of the language model's linear layers quantized, as it seems"
    what = f"in {method.weight_type}" if method is not None else as_it_seems
    return f"{len(source.tensors)} source tensors accounted for: {copied} kept, {quantized} {what}"


def _outcome(found: Tensor | None) -> tuple[str, str]:
    """The code and the words for what became of a source's tensor."""
    if found is None:
        return "tensor-lost", "is lost"
    return "tensor-changed", f"became {found.dtype} {list(found.shape)}"


def _packed(result: Checkpoint) -> set[str]:
    """What has codes: the names of tensors that hold some, of the modules that these belong to, and of fused blocks."""
    found: set[str] = set()
    for name, tensor in result.tensors.items():
        if tensor.dtype in PACKED and len(tensor.shape) > 1 and not ANY_SCALE.match(name):
            found |= {name, name.rpartition(".")[0], re.sub(r"_(blocks|packed)$", "", name)}
    return found
