"""A scale that is wrong is reported once: by the check that knows most about it."""

from __future__ import annotations

from dataclasses import replace

from pipeline.formats.methods import ANY_SCALE, CACHE_SCALE
from pipeline.verify.report import Finding

HASH = "hash-differs"
# codes of findings that dispute the value of a scale, from the one that says most of it
TELLING = (
    "kv-scales-swapped",
    "kv-scale-one",
    "kv-scale-not-finite",
    "scale-not-finite",
    "kv-scale-out-of-range",
    "input-scale-out-of-range",
    "kv-scale-not-measured",
    "requantized-differs",
    "weight-scale-coarse",
    "value-not-finite",
    HASH,
)


def once(findings: list[Finding]) -> list[Finding]:
    """The findings without those that dispute only scales which a more telling one disputes already.

    That the bytes are not those that the run wrote any more is not lost: the more telling finding then says it.
    """
    best: dict[str, Finding] = {}
    for finding in findings:
        for scale in _disputed(finding):
            if scale not in best or _rank(finding) < _rank(best[scale]):
                best[scale] = finding
    changed = {finding.subject: finding.text for finding in findings if finding.code == HASH}
    kept = []
    for finding in findings:
        mine = [scale for scale in _disputed(finding) if best[scale] is finding]
        if not mine and _disputed(finding) and not _is_of_weight(finding):
            continue
        if finding.code != HASH and (other := [scale for scale in mine if scale in changed]):
            more = f", nor are those of {len(other) - 1} more of them" if other[1:] else ""
            finding = replace(finding, text=f"{finding.text}; {changed[other[0]]}{more}")
        kept.append(finding)
    return kept


def _rank(finding: Finding) -> int:
    return TELLING.index(finding.code)


def _disputed(finding: Finding) -> tuple[str, ...]:
    """The scales whose value a finding disputes."""
    if finding.code not in TELLING:
        return ()
    if _is_of_weight(finding):  # a weight is its values times their scale, and either may be the wrong one
        return (f"{finding.subject}_scale",)
    return tuple(n for n in finding.covers or (finding.subject,) if ANY_SCALE.match(n) or CACHE_SCALE.search(n))


def _is_of_weight(finding: Finding) -> bool:
    return finding.code == "requantized-differs" and finding.subject.endswith(".weight")
