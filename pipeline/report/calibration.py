"""What calibration saw: quantize/calibration.json and the sentences about it, from the plan and the journal alone.

A pure function of both, so that a run that was killed and resumed says the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.formats.kv_scales import suspicious
from pipeline.journal import Journal
from pipeline.plan.plan import Plan

BALANCED = "equalized by powers of two, which changes no output"
FEW_TOKENS = 16


def as_json(plan: Plan, journal: Journal) -> dict[str, Any]:
    """Captions, batches and what was measured of every layer, as plain data."""
    found = plan.calibration
    assert found is not None
    captions, batches = found.captions, found.batches
    return {
        "captions": {
            "origin": captions.origin,
            "files": [{"name": name, "sha256": digest} for name, digest in captions.files],
            "read": captions.read,
            "empty": captions.empty,
            "duplicates": captions.duplicates,
            "over_per_image": captions.over_per_image,
            "terms": [{"licence": terms.licence, "attribution": terms.attribution} for terms in captions.terms],
        },
        "batches": {
            "samples": batches.samples,
            "tokens": batches.tokens,
            "shortest": batches.shortest,
            "longest": batches.longest,
            "cut": batches.cut,
            "batches": len(batches.batches),
            "sha256": batches.digest,
        },
        "device": found.device.name,
        "findings": findings(plan, journal),
        "layers": [{"layer": layer.label, **journal.facts.get(layer.unit, {})} for layer in found.layers],
    }


def findings(plan: Plan, journal: Journal) -> list[str]:
    """What a careful user should read: an unusual amax, what was equalized, experts that few tokens reached."""
    facts = {layer.index: journal.facts.get(layer.unit, {}) for layer in plan.layers}
    found = suspicious({index: fact.get("attention", {}) for index, fact in facts.items()})
    balanced = [(index, entry) for index, fact in facts.items() for entry in fact.get("balanced", [])]
    if balanced:
        kinds = sorted({(one.rpartition(".")[2], other.rpartition(".")[2]) for _, (one, other, _) in balanced})
        layers = _ranges({index for index, _ in balanced})
        exponents = sorted(entry[2] for _, entry in balanced)
        found.append(
            f"{', '.join(f'{one} against {other}' for one, other in kinds)} in layers {layers} {BALANCED} "
            f"(2^{exponents[0]} to 2^{exponents[-1]}, {len(balanced)} pairs)"
        )
    found += [note for fact in facts.values() for note in fact.get("notes", [])]
    counts = {
        (index, block): tokens
        for index, fact in facts.items()
        for block, tokens in fact.get("tokens_of_experts", {}).items()
    }
    if counts:
        every = [count for tokens in counts.values() for count in tokens]
        idle = sum(count == 0 for count in every)
        few = sum(0 < count < FEW_TOKENS for count in every)
        found.append(
            f"{len(every)} experts in {len(counts)} layers: {idle} were given no caption token, {few} fewer than "
            f"{FEW_TOKENS}, the median {sorted(every)[len(every) // 2]}; {plan.backend.expert_rule}"
        )
    return found


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: 0-3, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
