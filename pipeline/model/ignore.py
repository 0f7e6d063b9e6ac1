"""Ignore patterns of a recipe, and the ignore list of a quantization_config."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from typing import Literal

from pipeline.checkpoint.source import Checkpoint
from pipeline.errors import UsageError
from pipeline.formats.base import FP8, TYPE_NAMES
from pipeline.model.fused import FUSED_LINEARS

NEVER_QUANTIZED = ("vision_tower", "vision_model", "vit_large_projector")  # by vLLM, under ModelOpt's method


def matches(pattern: str, module: str) -> bool:
    """Whether an ignore pattern of a recipe means this module (see `select`)."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.startswith(f"{pattern}.") or fnmatchcase(module, pattern)


def ignored_modules(
    checkpoint: Checkpoint, modules: dict[str, str], patterns: list[str], heads: set[str] | frozenset[str] = frozenset()
) -> list[str]:
    """The modules that a recipe's patterns mean.

    `heads` are names of the head's module, which a model has although a tied one is in no file.

    Raises:
        UsageError: a pattern matches no module of the checkpoint.
    """
    everything = set(modules) | {name.rpartition(".")[0] for name in checkpoint.tensors} | heads
    for pattern in patterns:
        if not any(matches(pattern, module) for module in everything):
            example = next(iter(modules))
            raise UsageError(
                f"ignore: {pattern!r} matches no module of {checkpoint.label}",
                remedy=f"names are the checkpoint's own, e.g. {example}; globs (*.down_proj) and re: with a regular "
                "expression work too",
            )
    return [module for module in modules if any(matches(pattern, module) for pattern in patterns)]


def refuse_split_groups(modules: dict[str, str], ignored: list[str]) -> None:
    """Raise UsageError where a part of what vLLM fuses would be quantized and another part not."""
    gone = set(ignored)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        parent, _, last = module.rpartition(".")
        if expert := re.match(r"(.*\.experts)\.\d+$", parent):
            groups[(expert[1], "its experts, one fused kernel")].append(module)
            continue
        for fused, parts in FUSED_LINEARS:
            if last in parts:
                groups[(parent, fused)].append(module)
    for (parent, fused), members in groups.items():
        out = [member for member in members if member in gone]
        if out and len(out) < len(members):
            kept = [member for member in members if member not in gone]
            raise UsageError(
                f"ignore: {_names(out)} of {parent} would stay BF16 while {_names(kept)} become FP8, but vLLM fuses "
                f"them ({fused})",
                remedy="ignore all of them or none",
            )


def _names(modules: list[str]) -> str:
    parts = [module.split(".")[-1] for module in modules]
    if (len(set(parts)) == 1 and len(parts) > 1) or len(parts) > 6:
        return f"{len(parts)} modules ({modules[0]}, ...)"
    return ", ".join(parts)


@dataclass(frozen=True)
class IgnoreProblem:
    """What vLLM would do wrong with an ignore list, or an entry that does nothing.

    Attributes:
        kind: an FP8 weight is ignored, a plain weight is not, or an entry matches nothing: a module's name, or
            a pattern (for the parts of names that ModelOpt's older exports list, too).
        subject: the module, or the entry.
        text: a sentence that says it.
    """

    kind: Literal["fp8 ignored", "plain not ignored", "idle name", "idle pattern"]
    subject: str
    text: str


class IgnoreList:
    """The ``ignore`` of a quantization_config, as vLLM matches it.

    An entry is a module's name or a pattern: ``re:`` with a regular expression matched from the start of the name, or,
    in a format with globs, a glob.

    Args:
        entries: the list.
        globs: whether patterns are globs (`pipeline.formats.base.Format.ignore_globs`).
        loose: with globs, take names for parts of names as well, and some vision towers for ignored in any case, as
            vLLM does for its older exports (`ModelOptQuantConfigBase.is_layer_excluded`); this tool's need neither.

    Raises:
        ValueError: an entry is no text, or no regular expression.
    """

    def __init__(self, entries: Iterable[object], globs: bool = False, loose: bool = False) -> None:
        self.globs = globs
        self._loose = loose and globs
        self._literals: set[str] = set()
        self._patterns: dict[str, re.Pattern[str]] = {}
        for entry in entries:
            if not isinstance(entry, str):
                raise ValueError(f"{entry!r} is no module's name")
            if globs:
                if "*" in entry:
                    self._patterns[entry] = re.compile(translate(entry))
                else:
                    self._literals.add(entry)
                continue
            if not entry.startswith("re:"):
                self._literals.add(entry)
                continue
            try:
                self._patterns[entry] = re.compile(entry[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{entry!r} is no regular expression: {error}") from None

    def __contains__(self, module: str) -> bool:
        if self._loose and any(part in module for part in (*self._literals, *NEVER_QUANTIZED)):
            return True
        return module in self._literals or any(p.match(module) for p in self._patterns.values())

    def by_pattern(self, module: str) -> bool:
        """Whether a module is ignored by a pattern and not by its name."""
        return module in self and module not in self._literals

    def problems(self, linears: Mapping[str, str], modules: set[str], quantized: str = FP8) -> list[IgnoreProblem]:
        """What vLLM would do wrong with this list, and the entries that match nothing.

        Args:
            linears: every module with a 2-D weight that can be a linear layer, and the weight's dtype.
            modules: the names of all modules.
            quantized: the dtype of quantized weights (`pipeline.formats.base.Format.weight_dtype`).
        """
        found, kind = [], TYPE_NAMES.get(quantized, quantized)
        for module, dtype in linears.items():
            if dtype == quantized and module in self:
                text = f"{module}: it is {kind}, but the config ignores it: vLLM would load {kind} values as weights"
                found.append(IgnoreProblem("fp8 ignored", module, text))
            elif dtype != quantized and module not in self:
                text = (
                    f"{module}: {dtype}, but the config does not ignore it: vLLM would cast it to {kind} with a scale "
                    "that nobody set"
                )
                found.append(IgnoreProblem("plain not ignored", module, text))
        idle = sorted(self._literals - modules - {"lm_head"})
        if self._loose:
            idle = [entry for entry in idle if not any(entry in module for module in modules)]
        idle += [entry for entry, p in self._patterns.items() if not any(p.match(module) for module in modules)]
        for entry in idle:
            pattern = self._loose or entry.startswith("re:") or "*" in entry
            text = f"quantization_config.ignore: {entry!r} matches nothing in this checkpoint"
            found.append(IgnoreProblem("idle pattern" if pattern else "idle name", entry, text))
        return found
