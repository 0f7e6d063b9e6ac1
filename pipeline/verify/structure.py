"""The structural check of a checkpoint: what can be known without vLLM.

`contents` reads the tensors themselves; without it only headers, config and scales are read.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.backends.registry import of_identity
from pipeline.checkpoint.source import Checkpoint, SourceError, open_checkpoint
from pipeline.formats.base import Format
from pipeline.formats.methods import OLD_FILE, PACKED, SECTION, describe, method_of, quantization_section
from pipeline.journal import read_identity
from pipeline.model.ignore import IgnoreList
from pipeline.model.selection import (
    Selection,
    select,
)
from pipeline.verify.accounts import check_accounts
from pipeline.verify.files import check_config, check_tokenizer
from pipeline.verify.ignore_list import check_ignore
from pipeline.verify.kv_cache import check_cache
from pipeline.verify.other_source import OTHER_WEIGHTS, by_headers
from pipeline.verify.quant_config import check_hf_quant_config, check_section
from pipeline.verify.report import NOT_QUANTIZED, Report
from pipeline.verify.scale_findings import once
from pipeline.verify.scales import check_scales, check_scales_of_any_layout

MAIN_SHARE = 0.1  # of a checkpoint's bytes: a dtype of fewer is that of a few buffers or scales


def check_structure(directory: Path, source: Checkpoint | None = None, contents: bool = False) -> Report:
    """Check a quantized checkpoint.

    Args:
        directory: the checkpoint.
        source: what it was made from; every tensor of it must be accounted for.
        contents: also read every byte: against the hashes that the run recorded, and against the source.
    """
    report = empty_report(directory, source)
    try:
        result = open_checkpoint(directory)
    except (SourceError, OSError) as error:
        report.add("checkpoint-unreadable", "", str(error))
        return report
    report.checked.append(f"{len(result.shards)} shard(s): headers, lengths and index agree")
    _run(report, "config.json", _check_all, result, source, contents, report)
    return report


def empty_report(directory: Path, source: Checkpoint | None) -> Report:
    """An empty report, which knows whether this tool produced the checkpoint."""
    identity = read_identity(directory)
    options = (identity or {}).get("backend_options")
    exact = isinstance(options, dict) and options.get("exact") is True
    return Report(str(directory), source.label if source else None, identity is not None, library_config=exact)


def _check_all(result: Checkpoint, source: Checkpoint | None, contents: bool, report: Report) -> None:
    section = quantization_section(result)
    method = _method(result, section, report)
    if section is None and report.problems:
        return
    selection = _selection(result, method, report)
    ignore = IgnoreList([])

    def run(what: str, check: Callable[..., str | None], *args: Any) -> None:
        _run(report, what, check, *args)

    if section is not None and method is not None:
        run("scales", check_scales, result, method, report)
        ignore = check_section(section, method, report)
        if selection is not None:
            run("ignore list", check_ignore, result, selection, section, ignore, method, report)
    elif section is not None:
        run("scales", check_scales_of_any_layout, result, section, report)
    if section is not None and selection is not None:
        run("KV-cache scales", check_cache, result, selection, section, method, report)
    accounts, compared = report.beside(), report.beside()
    if source is not None:
        _run(accounts, "tensors", check_accounts, result, source, ignore, section, method, accounts)
        other = by_headers(accounts, result, source)
        if other is None and contents:
            from pipeline.verify.contents import check_bytes

            _run(compared, "contents", check_bytes, result, source, method, compared)
            other = next((finding for finding in compared.findings if finding.code == OTHER_WEIGHTS), None)
        if other is not None:  # said first, and instead of what follows from it
            report.findings.insert(0, other)
            accounts, compared, source = report.beside(), report.beside(), None
    run("tokenizer", check_tokenizer, result, selection, source, report)
    if method is not None and method.quant_algo is not None and section is not None:
        run(OLD_FILE, check_hf_quant_config, result, section, report)
    report.merge(accounts)
    if source is not None:
        run("config", check_config, result, source, report)
    if contents:
        from pipeline.verify.contents import check_hashes, check_numbers

        run("hashes", check_hashes, result, report)
        run("numbers", check_numbers, result, report)
    report.merge(compared)
    report.findings = once(report.findings)


def read_back(result: Checkpoint, stop: threading.Event) -> Report:
    """Every byte of a result against the hashes that its run recorded while writing, until `stop` is set."""
    from pipeline.verify.contents import check_hashes

    report = empty_report(result.root, None)
    _run(report, "hashes", check_hashes, result, report, stop)
    return report


def _run(report: Report, what: str, check: Callable[..., str | None], *args: Any) -> None:
    """Run a check. What it says is in order stands in the report if it found no problem; a config or a record whose
    values are of other kinds than they should be is a problem itself."""
    before = len(report.problems)
    try:
        said = check(*args)
    except (SourceError, OSError) as error:
        report.add("check-unreadable", what, f"{what}: it cannot be checked: {error}")
        return
    except Exception as error:  # a third party's config may hold anything, and a check ends over it in any way
        cause = f"{type(error).__name__}: {error}"
        text = f"{what}: it cannot be checked, a value is not what it should be: {cause}"
        report.add("check-value-unexpected", what, text)
        return
    if said is not None and len(report.problems) == before:
        report.checked.append(said)


def _method(result: Checkpoint, section: dict[str, Any] | None, report: Report) -> Format | None:
    """The layout that the config describes; where it is none that is known here, the report says so."""
    if section is None:
        _check_unquantized(result, report)
        return None
    if report.produced_here:
        scheme = of_identity(read_identity(result.root) or {})
        if scheme is not None and scheme.format.name == section.get("quant_method"):
            return scheme.format
    said = section.get("quant_method")
    report.add("quant-method-unknown", SECTION, f"quant_method {said!r} is none that this program writes")
    method = method_of(section)
    if method is None:
        report.add(
            "layout-unknown",
            SECTION,
            f"the layout of {describe(section)} is not known here: files, scales, numbers and what stays as it is "
            "are checked; whether it can be served says vLLM's load check alone",
        )
    return method


def _check_unquantized(result: Checkpoint, report: Report) -> None:
    """A checkpoint whose config describes no quantization has no tensors that only quantization writes."""
    codes = [tensor for tensor in result.tensors.values() if tensor.dtype in PACKED and len(tensor.shape) > 1]
    if codes:
        report.add(
            "section-missing",
            codes[0].name,
            f"{codes[0].name}: config.json has no {SECTION}: vLLM takes the checkpoint for unquantized and would take "
            f"the {codes[0].dtype} codes for plain weights",
        )
    elif result.config.get(SECTION) not in (None, {}):
        text = f"config.json: its {SECTION} is {result.config[SECTION]!r}, and no object"
        report.add("section-not-object", SECTION, text)
    else:
        sizes: Counter[str] = Counter()
        for tensor in result.tensors.values():
            sizes[tensor.dtype] += tensor.nbytes
        kinds = " and ".join(kind for kind, nbytes in sizes.most_common() if nbytes >= MAIN_SHARE * sizes.total())
        text = f"not quantized: the weights are {kinds}, and config.json has no {SECTION}"
        report.add(NOT_QUANTIZED, "config.json", text)


def _selection(result: Checkpoint, method: Format | None, report: Report) -> Selection | None:
    """What each tensor is for; None where its layers cannot be found."""
    try:
        return select(result)
    except SourceError as error:
        # packed weights hide the linear layers of other layouts
        if method is not None or not any(tensor.dtype in ("I32", "U8") for tensor in result.tensors.values()):
            report.add("layers-unknown", "", str(error))
        return None
