"""The model card: a pure function of the plan, what calibration found and the verdict, the same for the same run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.checkpoint.hub import hub_name, public_name
from pipeline.checkpoint.result import PROFILE
from pipeline.formats.base import FP8
from pipeline.plan.plan import Plan
from pipeline.recipe.recipe import recipe_yaml
from pipeline.report.plan import summary
from pipeline.serving import profile
from pipeline.serving.command import spelled_out
from pipeline.units import size_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

# tags of a source that are about its files or its training, and would be wrong of the result
OTHER_TAGS = frozenset({
    "autotrain_compatible", "awq", "bf16", "bfloat16", "endpoints_compatible", "fp16", "fp32", "generated_from_trainer",
    "gguf", "gptq", "jax", "lora", "mlx", "onnx", "peft", "pytorch", "safetensors", "sft", "tensorflow", "tf",
    "text-generation-inference", "transformers", "trl", "unsloth",
})  # fmt: skip
TRUSTED = "trust-remote-code"


def model_card(plan: Plan, verdict: Mapping[str, Any], findings: Sequence[str] = (), device: str | None = None) -> str:
    """README.md of the result: metadata that the hub reads, and what a reader of its page needs.

    Args:
        plan: what was done, and what the source's own card says.
        verdict: of the verification, as quantize/verify.json holds it.
        findings: what calibration found, sentence by sentence.
        device: what computed the layers; None where none did.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.report"), undefined=StrictUndefined, keep_trailing_newline=True,
        autoescape=False, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    source, backend = plan.checkpoint, plan.backend
    metadata = _metadata(plan)
    hub_id, revision = hub_name(source)
    base = plan.recipe.card.base_model or hub_id
    section = backend.config_section(plan.selection)
    facts: dict[str, Any] = {
        "metadata": metadata.to_yaml(),
        "data": metadata,
        "title": _title(plan),
        "source": public_name(source),
        "base_model": base,
        "revision": revision if base == hub_id else None,
        "ancestors": () if base else plan.source_card.base_model,
        "architectures": source.config.get("architectures") or [],
        "rows": [
            {**row, "source": size_text(row["source_bytes"]), "output": size_text(row["output_bytes"])}
            for row in summary(plan)
        ],
        "source_size": size_text(source.nbytes),
        "output_size": size_text(plan.output_nbytes),
        "recipe": recipe_yaml(plan.recipe, public_name(source), revision, weights_alone=True).rstrip(),
        "version": __version__,
        "libraries": backend.versions(set()),
        "kv_cache": plan.recipe.kv_cache,
        "about": backend.card,
        "weight_type": "FP8 (E4M3)" if backend.format.weight_dtype == FP8 else backend.format.weight_type,
        "fp8": backend.format.weight_dtype == FP8 and bool(backend.format.inputs),
        "readable": section.get("quant_method") == "compressed-tensors",
        "rounded_up": "BF16" in {output.dtype for output in backend.attention_outputs()},
        "calibration": plan.calibration,
        "terms": plan.calibration.captions.terms if plan.calibration is not None else (),
        "findings": findings,
        "device": device,
        "licence": _licence(metadata),
        "headline": _headline(verdict),
        "verdict": verdict,
        "figures": list(_figures(verdict)),
        **_serving(plan),
    }
    return environment.get_template("card.md.jinja").render(facts)


def _title(plan: Plan) -> str:
    """The repository's name, or the directory's."""
    return (plan.recipe.card.repo_id or Path(plan.recipe.output).name).rpartition("/")[2]


def _metadata(plan: Plan) -> ModelCardData:
    """The front matter: the recipe's word, else that of the source's card.

    A local source is a model of its own. Its card's base model is then what the result descends from, and not what was
    quantized: the relation that the source has to it is named.
    """
    from huggingface_hub import ModelCardData

    asked, said = plan.recipe.card, plan.source_card
    base: str | list[str] | None = asked.base_model or hub_name(plan.checkpoint)[0]
    relation = "quantized"
    if base is None and said.base_model:
        base = said.base_model[0] if len(said.base_model) == 1 else list(said.base_model)
        relation = said.base_model_relation or ("finetune" if isinstance(base, str) else "merge")
    same = asked.licence in (None, said.license)
    languages = asked.language or list(said.language)
    usual = "image-text-to-text" if "vision_config" in plan.checkpoint.config else "text-generation"
    own = [plan.backend.format.weight_type.lower(), "vllm", *plan.backend.tags]
    others = [tag for tag in said.tags if tag.lower() not in OTHER_TAGS and ":" not in tag]
    return ModelCardData(
        license=asked.licence or said.license,
        license_name=said.license_name if same else None,
        license_link=said.license_link if same else None,
        language=languages[0] if len(languages) == 1 else languages or None,
        base_model=base,
        base_model_relation=relation if base else None,
        library_name="vllm",
        pipeline_tag=said.pipeline_tag or usual,
        tags=[*own, *others],
    )


def _licence(data: ModelCardData) -> str | None:
    name = data.license_name or data.license
    return f"[{name}]({data.license_link})" if name and data.license_link else name


def _serving(plan: Plan) -> dict[str, Any]:
    """The serve command, with the words of the serve config: for the hub's page, and for a downloaded directory."""
    recipe, config, name = plan.recipe, plan.checkpoint.config, Path(plan.recipe.output).name
    fp8_cache = recipe.kv_cache == "fp8"
    made = profile.arguments(recipe.serve, config, name, plan.output_nbytes, fp8_cache, plan.source_dtypes)
    directory = f"./{name}" if name.startswith("-") else name
    by_file: dict[str, Any] = {"config": f"{directory}/{PROFILE}"}
    if config.get("auto_map") and TRUSTED not in made:
        made, by_file = made | {TRUSTED: True}, by_file | {TRUSTED: True}
    return {
        "command": spelled_out(recipe.card.repo_id or directory, made),
        "by_file": spelled_out(directory, by_file).replace(" \\\n  ", " "),
        "directory": directory,
        "repo_id": recipe.card.repo_id,
        "served_name": made["served-model-name"],
        "cache": profile.fit(recipe.serve, config, plan.output_nbytes, fp8_cache).cache.per_token,
    }


def _headline(verdict: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    vllm = verdict.get("vllm") or {}
    server = vllm.get("server") or "vLLM"
    if vllm.get("platform"):
        server += f" (on {vllm['platform']})"
    level = f"`verify: {verdict['level']}`"
    if not verdict["passed"]:
        return "**It failed verification**: do not serve it."
    if verdict["proven_in_vllm"]:
        ran = "loaded and run" if verdict["level"] == "generate" else "loaded"
        return f"**Passed** ({level}): {ran} in {server}."
    if verdict["asked"] == "structure":
        return f"**Passed** ({level}): its files were checked. It was not loaded in vLLM."
    return f"**Not validated in vLLM**: `verify: {verdict['asked']}` was asked for; its files were checked and passed."


def _figures(verdict: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What ``verify: generate`` measured, a row for each dtype of the KV cache."""
    for kv, found in ((verdict.get("vllm") or {}).get("generated") or {}).items():
        same, total = found["greedy_tokens_equal"]
        yield {
            "kv": kv,
            "source": _number(found["perplexity_of_source"], 3),
            "result": _number(found["perplexity"], 3),
            "ratio": _number(found["perplexity_ratio"], 4),
            "same": f"{same} of {total}",
            "scored": str(found["tokens_scored"]),
        }


def _number(value: float | str, digits: int) -> str:
    """A figure; one that is not finite is a word already."""
    return value if isinstance(value, str) else f"{value:.{digits}f}"
