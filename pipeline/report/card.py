"""The model card: a pure function of the plan, the same for the same run."""

from __future__ import annotations

from typing import Any

from pipeline import __version__
from pipeline.plan import Plan, size_text, summary


def model_card(plan: Plan, recipe_text: str) -> str:
    """README.md of the result, with metadata that the hub reads.

    Args:
        plan: of the run.
        recipe_text: the recipe as YAML, resolved.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    source = plan.checkpoint
    on_hub = source.revision is not None
    data = ModelCardData(
        base_model=source.label if on_hub else None,
        base_model_relation="quantized" if on_hub else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if "vision_config" in source.config else "text-generation",
        tags=["fp8", "compressed-tensors", "vllm", "llm-compressor"],
    )
    environment = Environment(
        loader=PackageLoader("pipeline.report"), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    facts: dict[str, Any] = {
        "metadata": data.to_yaml(),
        "title": plan.recipe.output.rstrip("/").rpartition("/")[2],
        "source": source.label,
        "on_hub": on_hub,
        "revision": source.revision,
        "rows": [
            {**row, "source": size_text(row["source_bytes"]), "output": size_text(row["output_bytes"])}
            for row in summary(plan)
        ],
        "source_size": size_text(source.nbytes),
        "output_size": size_text(plan.output_nbytes),
        "recipe": recipe_text.rstrip(),
        "version": __version__,
        "libraries": plan.backend.versions(),
        "kv_cache": plan.recipe.kv_cache,
        "custom_code": bool(source.config.get("auto_map")),
    }
    return environment.get_template("card.md.jinja").render(facts)
