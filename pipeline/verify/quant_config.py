"""The quantization section of config.json, as vLLM reads it."""

from __future__ import annotations

from typing import Any

from pipeline.checkpoint.source import Checkpoint, read_json
from pipeline.formats.base import Format
from pipeline.formats.methods import FLOAT_QUANTIZED, OLD_FILE, SECTION, group_fits
from pipeline.model.ignore import IgnoreList
from pipeline.verify.report import Report


def check_section(section: dict[str, Any], method: Format, report: Report) -> IgnoreList:
    """The parts of the section that vLLM reads: what a group quantizes, how, and what is ignored."""
    groups = section.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    known = method.section_format or FLOAT_QUANTIZED
    odd = [group["format"] for group in found if isinstance(group, dict) and group.get("format") not in (None, *known)]
    if odd:
        text = f"{SECTION}.config_groups: a group's format is {odd[0]!r}, not {known[0]}"
        report.add("group-format-unknown", f"{SECTION}.config_groups", text)
    unsaid = method.groups_optional and not groups and not report.produced_here  # vLLM does not look at them there
    if not unsaid and (not found or not all(group_fits(group, method) for group in found)):
        how = (
            f"{method.weight_type}, and their inputs not quantized"
            if not method.inputs
            else "FP8 with static per-tensor scales, and so their inputs"
            if method.granularity == "tensor"
            else "FP8 with per-channel scales and activations FP8 per token"
        )
        report.add(
            "groups-do-not-fit",
            f"{SECTION}.config_groups",
            f"{SECTION}.config_groups: they do not say that Linear weights are {how}: vLLM would read the scales "
            "wrongly",
        )
    for key in ("transform_config", "sparsity_config"):
        if section.get(key):
            report.add(
                "transform-unexpected",
                f"{SECTION}.{key}",
                f"{SECTION}.{key}: vLLM would apply it to weights that are FP8 and nothing else",
                "whoever made this checkpoint must say why it is there",
            )
    if method.section_format and section.get("format") not in method.section_format:
        text = f"{SECTION}.format is {section.get('format')!r}, not {known[0]}"
        report.add("section-format-wrong", f"{SECTION}.format", text)
    if method.quant_algo is not None and section.get("quant_algo") != method.quant_algo:
        text = f"{SECTION}.quant_algo is {section.get('quant_algo')!r}, not {method.quant_algo}"
        report.add("quant-algo-wrong", f"{SECTION}.quant_algo", text)
    entries = section.get("ignore") or []
    try:
        if not isinstance(entries, list):
            raise ValueError(f"{entries!r} is no list")
        return IgnoreList(entries, method.ignore_globs, loose=report.library_config or not report.produced_here)
    except ValueError as error:
        report.add("ignore-list-invalid", f"{SECTION}.ignore", f"{SECTION}.ignore: {error}")
        return IgnoreList([])


def check_hf_quant_config(result: Checkpoint, section: dict[str, Any], report: Report) -> None:
    """ModelOpt's older file, which vLLM reads where config.json has no section: both must say the same."""
    path = result.root / OLD_FILE
    if not path.exists() or SECTION not in result.config:
        return
    old = read_json(path).get("quantization")
    if not isinstance(old, dict):
        text = f"{OLD_FILE}: its quantization is no object; vLLM may fail over it"
        report.add("hf-quant-config-invalid", OLD_FILE, text)
        return
    ours = (section.get("quant_algo"), _as_set(section.get("ignore")), bool(section.get("kv_cache_scheme")))
    theirs = (old.get("quant_algo"), _as_set(old.get("exclude_modules")), bool(old.get("kv_cache_quant_algo")))
    if ours != theirs:
        text = f"{OLD_FILE}: it says something else than config.json's {SECTION}"
        report.add("hf-quant-config-differs", OLD_FILE, text)


def _as_set(entries: Any) -> set[str]:
    return {str(entry) for entry in entries or []}
