"""The config's ignore list against the tensors beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline.checkpoint.source import Checkpoint
from pipeline.formats.base import FP8, Format
from pipeline.model.ignore import IgnoreList
from pipeline.model.selection import Selection, expert_modules, is_linear_shaped
from pipeline.verify.report import Report

IGNORE_CODES = {
    "fp8 ignored": "fp8-weight-ignored",
    "plain not ignored": "plain-weight-not-ignored",
    "idle name": "ignore-entry-idle",
    "idle pattern": "ignore-pattern-idle",  # exporters list those for parts that a model may not have
}


def check_ignore(
    result: Checkpoint,
    selection: Selection,
    section: dict[str, Any],
    ignore: IgnoreList,
    method: Format,
    report: Report,
) -> str:
    """Every plain linear weight is ignored by the config, no quantized weight is, and no entry matches nothing."""
    own_names = report.produced_here and not report.library_config
    linears = {
        name.removesuffix(".weight"): tensor.dtype
        for name, tensor in result.tensors.items()
        if is_linear_shaped(tensor)
        and selection.choices[name].role != "embedding"
        and (own_names or not _may_be_embedding(name, selection))
        and (tensor.dtype == method.weight_dtype or targeted(name.removesuffix(".weight"), section))
    }
    modules = {name.rpartition(".")[0] for name in result.tensors}
    for name in result.tensors:  # fused experts that stay as they are go by their experts' names in a config
        block, _, kind = name.rpartition(".")
        if block in selection.expert_layouts and kind in ("gate_up_proj", "down_proj"):
            for _, parts in expert_modules(block, kind, selection.expert_layouts[block]):
                modules.update(module for module, _, _ in parts)
    if not own_names:  # others list the names that transformers has; vLLM translates those as well
        linears = {
            next((alias for alias in aliases(name) if alias in ignore), name) if name not in ignore else name: dtype
            for name, dtype in linears.items()
        }
        modules |= {alias for name in modules for alias in aliases(name)}
    for problem in ignore.problems(linears, modules, method.weight_dtype):
        code = IGNORE_CODES[problem.kind]
        if report.library_config and problem.kind in ("idle name", "idle pattern"):
            code = "ignore-entry-modelopts"  # a tied head, for one, is a module of transformers' class and no tensor
        report.add(code, problem.subject, problem.text)
    quantized = {n: selection.choices[n].role for n, t in result.tensors.items() if t.dtype == method.weight_dtype}
    if table := [name for name, role in quantized.items() if role == "embedding"]:
        text = f"{table[0]}: an embedding in {method.weight_type}, which vLLM would take for plain weights"
        report.add("embedding-quantized", table[0], text)
    _check_renamed(result, ignore, linears, report)
    if outside := [name for name, role in quantized.items() if role == "outside"]:
        text = f"{outside[0]}: {len(outside)} weights outside the language model are {method.weight_type}"
        report.add("outside-quantized", outside[0], text)
    plain = sum(dtype != method.weight_dtype for dtype in linears.values())
    return f"{plain} plain linear weights: the config ignores each, and no {method.weight_type} weight"


def _may_be_embedding(name: str, selection: Selection) -> bool:
    """Whether a weight outside the language model may be a table and no linear layer, of which no config speaks.

    Qwen3-VL's ``pos_embed`` is one. vLLM's loader knows for certain.
    """
    return selection.choices[name].role == "outside" and "embed" in name.split(".")[-2]


def targeted(module: str, section: dict[str, Any]) -> bool:
    """Whether a group of compressed-tensors means this linear layer: the class Linear, its name, or a pattern of it."""
    groups = section.get("config_groups")
    targets = [t for g in groups.values() for t in g.get("targets") or []] if isinstance(groups, dict) else ["Linear"]
    return any(t == "Linear" or t == module or (t[:3] == "re:" and re.match(t[3:], module)) for t in targets)


def aliases(module: str) -> Iterator[str]:
    """Other names of a module: transformers 5 puts Qwen's parts below ``model``, the hub and vLLM may not."""
    for old, new in (
        ("visual.", "model.visual."), ("model.visual.", "visual."), ("model.layers.", "model.language_model.layers."),
        ("model.language_model.layers.", "model.layers."), ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
    ):  # fmt: skip
        if module.startswith(old):
            yield new + module.removeprefix(old)


def _check_renamed(result: Checkpoint, ignore: IgnoreList, linears: dict[str, str], report: Report) -> None:
    """Regular expressions that cover Qwen's vision tower under the checkpoint's name alone.

    vLLM calls it ``visual`` also where the checkpoint says ``model.visual``. It translates names and globs of the list,
    but no regular expressions.
    """
    if ignore.globs or not str(result.config.get("model_type")).startswith("qwen"):
        return
    for name, dtype in linears.items():
        alias = name.removeprefix("model.")
        if dtype == FP8 or not name.startswith("model.visual.") or not ignore.by_pattern(name):
            continue
        if alias not in ignore:
            report.add(
                "ignore-misses-vllm-name",
                name,
                f"{name}: the config ignores it by a pattern that misses {alias}, as vLLM calls it; it would cast "
                "these weights to FP8",
                "write re:.*visual.*, or every name",
            )
            return
