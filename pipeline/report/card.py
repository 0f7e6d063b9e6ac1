"""The model card: a pure function of the plan, the same for the same run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline import __version__
from pipeline.checkpoint.source import Checkpoint
from pipeline.formats.base import FP8
from pipeline.plan.plan import Plan
from pipeline.recipe.recipe import recipe_yaml
from pipeline.report.plan import summary
from pipeline.units import size_text


def model_card(plan: Plan, findings: Sequence[str] = ()) -> str:
    """README.md of the result, with metadata that the hub reads, and without the paths of this machine.

    Args:
        plan: what was done.
        findings: what calibration found, sentence by sentence.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    source = plan.checkpoint
    base_model, revision = _hub_name(source)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag="image-text-to-text" if "vision_config" in source.config else "text-generation",
        tags=[plan.backend.format.weight_type.lower(), "vllm", *plan.backend.tags],
    )
    environment = Environment(
        loader=PackageLoader("pipeline.report"), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    facts: dict[str, Any] = {
        "metadata": data.to_yaml(),
        "title": plan.recipe.output.rstrip("/").rpartition("/")[2],
        "source": source.root.name,
        "base_model": base_model,
        "revision": revision,
        "rows": [
            {**row, "source": size_text(row["source_bytes"]), "output": size_text(row["output_bytes"])}
            for row in summary(plan)
        ],
        "source_size": size_text(source.nbytes),
        "output_size": size_text(plan.output_nbytes),
        "recipe": recipe_yaml(plan.recipe, base_model or source.root.name).rstrip(),
        "version": __version__,
        "libraries": plan.backend.versions(set()),
        "kv_cache": plan.recipe.kv_cache,
        "about": plan.backend.card,
        "weight_type": "FP8 (E4M3)" if plan.backend.format.weight_dtype == FP8 else plan.backend.format.weight_type,
        "rounded_up": "BF16" in {output.dtype for output in plan.backend.attention_outputs()},
        "calibration": plan.calibration,
        "terms": plan.calibration.captions.terms if plan.calibration is not None else (),
        "findings": findings,
        "custom_code": bool(source.config.get("auto_map")),
    }
    return environment.get_template("card.md.jinja").render(facts)


def _hub_name(source: Checkpoint) -> tuple[str | None, str | None]:
    """The hub id and commit of a checkpoint, also of a directory inside the hub's cache; None where unknown."""
    if source.revision is not None:
        return source.label, source.revision
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)$", str(source.root.absolute()))
    return (f"{cached[1]}/{cached[2]}", cached[3]) if cached else (None, None)
