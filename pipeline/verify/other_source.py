"""Whether the source that was named is another model: then that is one finding, not one for every tensor."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.checkpoint.config import text_config
from pipeline.checkpoint.source import Checkpoint
from pipeline.model.selection import select
from pipeline.verify.report import Finding, Report

FEW = 8  # findings that are listed in any case
EXAMPLES = 3
OF_HEADERS = ("tensor-lost", "tensor-changed")
OF_COPIES = ("bytes-differ", "rounded-values-differ")
OF_QUANTIZED = ("requantized-differs", "weight-far-from-source")
OTHER_SHAPES, OTHER_WEIGHTS = "source-of-other-shapes", "source-of-other-weights"
REMEDY = "name the checkpoint that it was made from"


def is_other(report: Report) -> bool:
    """Whether a report says that the source is not what the checkpoint was made from."""
    return any(finding.code in (OTHER_SHAPES, OTHER_WEIGHTS) for finding in report.findings)


def by_headers(accounts: Report, result: Checkpoint, source: Checkpoint) -> Finding | None:
    """The one finding, where most tensors of the source are not here, or have other shapes.

    Where linear layers alone are not found, somebody gave their codes unknown names, and the list says which.

    Args:
        accounts: what the check of every tensor's account found.
        result: the checkpoint.
        source: what was named.
    """
    wrong = [finding.subject for finding in accounts.findings if finding.code in OF_HEADERS]
    if not _most(len(wrong), len(source.tensors)):
        return None
    choices = select(source).choices
    if all(name not in choices or choices[name].role in ("linear", "experts") for name in wrong):
        return None
    lost = [name for name in wrong if name not in result.tensors]
    there = [name for name in wrong if name in result.tensors and name in source.tensors]
    shapes = [
        f"{name} ({list(source.tensors[name].shape)} there, {list(result.tensors[name].shape)} here)" for name in there
    ]
    text = (
        f"--source {source.label} is another model than this was made from{_kinds(result, source)}: "
        f"{len(lost)} of its {len(source.tensors)} tensors are not here, {len(wrong) - len(lost)} have another shape "
        f"or dtype, first {', '.join([*shapes, *lost][:EXAMPLES])}; nothing else was held against it"
    )
    return Finding(OTHER_SHAPES, "", text, REMEDY)


def by_contents(contents: Report, copies: int, quantized: int, source: Checkpoint) -> Finding | None:
    """The one finding, where most tensors that were copied, or most that were quantized, are not this source's.

    Args:
        contents: what the comparison of every tensor found.
        copies: how many tensors were compared that stay as they are.
        quantized: how many were compared that are quantized.
        source: what was named.
    """
    other = [finding.subject for finding in contents.findings if finding.code in OF_COPIES]
    far = [finding.subject for finding in contents.findings if finding.code in OF_QUANTIZED]
    if not (_most(len(other), copies) or _most(len(far), quantized)):
        return None
    counts = [f"{len(other)} of {copies} tensors that stay as they are hold other numbers"] if other else []
    counts += [f"{len(far)} of {quantized} that are quantized are not what it gives"] if far else []
    text = (
        f"--source {source.label} is another model of the same shapes, such as a fine-tune or its base"
        + ("" if other else ", or the weights were transformed or quantized wrongly")
        + f": {', '.join(counts)}, first {', '.join([*far, *other][:EXAMPLES])}; nothing else was held against it"
    )
    return Finding(OTHER_WEIGHTS, "", text, REMEDY)


def _most(wrong: int, of: int) -> bool:
    return wrong > max(FEW, of / 2)


def _kinds(result: Checkpoint, source: Checkpoint) -> str:
    """What both configs say that they are, where they say different things."""
    theirs, ours = (_kind(checkpoint) for checkpoint in (source, result))
    return f" (it is {theirs}, this is {ours})" if theirs != ours else ""


def _kind(checkpoint: Checkpoint) -> str:
    named, text = checkpoint.config.get("architectures"), text_config(checkpoint.config)
    words: Sequence[object] = named if isinstance(named, list) and named else [checkpoint.config.get("model_type")]
    sizes = [
        f"{text[key]} {what}"
        for key, what in (("num_hidden_layers", "layers"), ("hidden_size", "wide"))
        if text.get(key)
    ]
    return f"{words[0]} of {', '.join(sizes)}" if sizes else str(words[0])
