"""Everything beside the weights, written last: small files, records, config.json, the index, verdict and card."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import __version__
from pipeline.checkpoint import sidecars
from pipeline.checkpoint.config import untied, untied_text
from pipeline.checkpoint.hub import hub_name, public_name
from pipeline.checkpoint.result import CALIBRATION, CARD, EVENTS, FILES, LAYERS, PROFILE, RECIPE, VERDICT, VERSIONS
from pipeline.checkpoint.sidecars import config_with, record_files
from pipeline.checkpoint.source import INDEX, read_json
from pipeline.checkpoint.writer import json_bytes, sync_all, sync_directory, write_file
from pipeline.events import EventLog, recorded_layers
from pipeline.journal import Journal
from pipeline.plan.plan import Plan
from pipeline.report import calibration as calibration_report
from pipeline.run.redact import Redaction
from pipeline.serving import profile
from pipeline.verify.report import Report

LIBRARIES = ("compressed-tensors", "llmcompressor", "nvidia-modelopt", "safetensors", "torch", "transformers")


def finalize(plan: Plan, journal: Journal, log: EventLog) -> None:
    """Everything beside the weights; config.json and the index last, so that nothing looks whole before it is."""
    from pipeline.recipe.recipe import recipe_yaml

    partial = journal.partial
    sidecars.carry_files(plan.checkpoint, partial)
    served = profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes, plan.source_dtypes)
    write_file(partial / PROFILE, served.encode())
    revision = hub_name(plan.checkpoint)[1]
    write_file(partial / RECIPE, recipe_yaml(plan.recipe, public_name(plan.checkpoint), revision).encode())
    write_file(partial / VERSIONS, json_bytes(_versions(plan)))
    write_file(partial / LAYERS, json_bytes(recorded_layers(partial / EVENTS)))
    if plan.calibration is not None:
        seen = Redaction(plan).value(calibration_report.as_json(plan, journal))
        write_file(partial / CALIBRATION, json_bytes(seen))
    write_config(plan, partial)
    write_index(plan, partial)
    sync_all(path for path in partial.rglob("*") if path.is_file())
    sync_directory(partial)
    log.write("sealed", bytes=plan.output_nbytes)


def record_verdict(plan: Plan, partial: Path, report: Report, log: EventLog) -> None:
    """Write what verification found into the result that it judged, whether or not that is published; then its card."""
    write_verdict(plan, partial, report)
    text = card_text(plan, partial)
    write_file(partial / CARD, text)
    log.write("card", sha256=hashlib.sha256(text).hexdigest())
    log.write("verified", passed=report.passed, problems=report.problems, proven_in_vllm=report.proven_in_vllm)


def write_verdict(plan: Plan, directory: Path, report: Report) -> None:
    """Write quantize/verify.json, for others to read."""
    write_file(directory / VERDICT, json_bytes(Redaction(plan).value(report.as_json())))


def card_text(plan: Plan, directory: Path) -> bytes:
    """The model card of a result, as its records are now.

    Args:
        plan: of the run.
        directory: the result, with its verdict.
    """
    from pipeline.report.card import model_card

    seen = read_json(directory / CALIBRATION) if plan.calibration is not None else {}
    card = model_card(plan, read_json(directory / VERDICT), seen.get("findings", ()), seen.get("device"))
    return Redaction(plan).text(card).encode()


def _versions(plan: Plan) -> dict[str, str]:
    found = {"fp8-pipeline": __version__, "python": platform.python_version(), "system": _system()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {**found, **plan.backend.versions(set())}


def _system() -> str:
    """Without the kernel's release, which tells about the machine."""
    return " ".join(part for part in (platform.system(), platform.machine(), *platform.libc_ver()) if part)


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
