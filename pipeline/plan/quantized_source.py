"""Sources that are quantized, in whole or in part, and sections that say so of weights that are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.checkpoint.source import Checkpoint, SourceError, Tensor
from pipeline.formats.methods import ANY_SCALE, PACKED, SECTION
from pipeline.model.selection import REASONS, Selection, is_linear_shaped

PLACES = ("text_config", "llm_config", "language_config", "thinker_config")
BUFFER = re.compile(r"(^|[._])(ids|id|index|indices|mask|counter|table|bins)$")  # integers that are no weights


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise SourceError where config.json describes a quantization: the weights have it, or it is a leftover."""
    found = _sections(checkpoint.config)
    if not found:
        return
    place, section = next(iter(found.items()))
    method = section.get("quant_method", "?") if isinstance(section, dict) else "?"
    if holds_codes(checkpoint):
        raise SourceError(
            f"{checkpoint.label}: this checkpoint is quantized already ({method})",
            remedy="a second rounding only loses: name the BF16 original as model.source",
        )
    where = "config.json" if checkpoint.revision is None else "config.json, in a copy of your own,"
    raise SourceError(
        f"{checkpoint.label}: no tensor here is quantized, the section {place} ({method}) in config.json is a leftover",
        remedy=f"remove {' and '.join(found)} from {where} and run again",
    )


def _sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Descriptions of a quantization, by where they stand in a config."""
    found = {key: config[key] for key in (SECTION, "compression_config") if config.get(key)}
    for part in PLACES:
        nested = config.get(part)
        if isinstance(nested, dict):
            found.update({f"{part}.{key}": value for key, value in _sections(nested).items()})
    return found


def holds_codes(checkpoint: Checkpoint) -> bool:
    """Whether any tensor can hold quantized values: of more than one dimension, in a dtype that weights do not have."""
    return any(_is_code(tensor) for tensor in checkpoint.tensors.values())


def _is_code(tensor: Tensor) -> bool:
    if tensor.dtype not in PACKED or len(tensor.shape) < 2:
        return False
    return not ANY_SCALE.match(tensor.name) and not BUFFER.search(tensor.name)


def refuse_quantized_parts(checkpoint: Checkpoint, selection: Selection, values: str) -> None:
    """Raise SourceError where a linear weight or an embedding is quantized in a source whose config does not say so.

    It would be copied, and a server would take its codes for numbers. So would whatever has the dtype of the result's
    own quantized values, `values`.
    """
    others = [t for name, t in checkpoint.tensors.items() if selection.choices[name].role not in ("linear", "experts")]
    found = [t for t in others if t.dtype == values or (t.dtype in PACKED and is_linear_shaped(t))]
    if not found:
        return
    first = found[0]
    role = selection.choices[first.name].role
    where = {"head": "the output head", "outside": "outside the language model"}.get(role, REASONS[role])
    raise SourceError(
        f"{first.name}: {first.dtype} values in {len(found)} tensor(s), this one {where}: a part of this checkpoint is "
        "quantized already, and config.json does not say how",
        remedy="use the original checkpoint, with this tensor in BF16, F16 or F32",
    )
