"""Everything beside the weights, written last: small files, card, records, config.json and the index."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__
from pipeline.checkpoint import sidecars
from pipeline.checkpoint.config import untied, untied_text
from pipeline.checkpoint.result import CALIBRATION, EVENTS, FILES, LAYERS, PROFILE, RECIPE, VERDICT, VERSIONS
from pipeline.checkpoint.sidecars import config_with, record_files
from pipeline.checkpoint.source import INDEX
from pipeline.checkpoint.writer import json_bytes, sync_all, sync_directory, write_file
from pipeline.events import EventLog, recorded_layers
from pipeline.journal import Journal
from pipeline.plan.plan import Plan
from pipeline.report import calibration as calibration_report
from pipeline.serving import profile
from pipeline.verify.report import Report

LIBRARIES = ("compressed-tensors", "llmcompressor", "nvidia-modelopt", "safetensors", "torch", "transformers")


def finalize(plan: Plan, journal: Journal, log: EventLog) -> None:
    """Everything beside the weights; config.json and the index last, so that nothing looks whole before it is."""
    from pipeline.recipe.recipe import recipe_yaml
    from pipeline.report.card import model_card

    partial = journal.partial
    sidecars.carry_files(plan.checkpoint, partial)
    write_file(partial / "README.md", model_card(plan, calibration_report.findings(plan, journal)).encode())
    served = profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes, plan.source_dtypes)
    write_file(partial / PROFILE, served.encode())
    write_file(partial / RECIPE, recipe_yaml(plan.recipe).encode())
    write_file(partial / VERSIONS, json_bytes(_versions(plan)))
    write_file(partial / LAYERS, json_bytes(recorded_layers(partial / EVENTS)))
    if plan.calibration is not None:
        write_file(partial / CALIBRATION, json_bytes(calibration_report.as_json(plan, journal)))
    write_config(plan, partial)
    write_index(plan, partial)
    sync_all(path for path in partial.rglob("*") if path.is_file())
    sync_directory(partial)
    log.write("sealed", bytes=plan.output_nbytes)


def record_verdict(partial: Path, report: Report, log: EventLog) -> None:
    """Write what verification found into the result that it judged, whether or not that is published."""
    write_file(partial / VERDICT, json_bytes(report.as_json()))
    log.write("verified", passed=report.passed, problems=report.problems, proven_in_vllm=report.proven_in_vllm)


def _versions(plan: Plan) -> dict[str, str]:
    found = {"fp8-pipeline": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, **plan.backend.versions(set())}


def write_config(plan: Plan, target: Path) -> None:
    """Write config.json, the source's with the backend's section, and what else the backend writes beside it.

    Their hashes are added to those of `carry_files`.
    """
    extra = plan.backend.extra_files(plan.checkpoint, plan.selection)
    own_head = plan.selection.own_head is not None
    if own_head and "config.json" in extra:
        extra["config.json"] = untied(extra["config.json"])
    for name, content in extra.items():
        write_file(target / name, (json.dumps(content, indent=4) + "\n").encode())
    if "config.json" not in extra:  # in ModelOpt's exact mode it is ModelOpt's
        text = (plan.checkpoint.root / "config.json").read_bytes().decode("utf-8")  # with its own ends of lines
        section = plan.backend.config_section(plan.selection)
        write_file(target / "config.json", config_with(untied_text(text) if own_head else text, section).encode())
    record_files(target, json.loads((target / FILES).read_text()), ("config.json", *extra))


def write_index(plan: Plan, target: Path) -> None:
    """Write the index: total size in bytes and the shard of every tensor, by name, as transformers does."""
    names = sorted(plan.outputs)
    index = {
        "metadata": {"total_size": sum(output.nbytes for output in plan.outputs.values())},
        "weight_map": {name: plan.shards[plan.outputs[name].shard].name for name in names},
    }
    write_file(target / INDEX, (json.dumps(index, indent=2) + "\n").encode())
