"""Views of a plan: a table's rows, and the whole as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.plan.calibration import CalibrationPlan
from pipeline.plan.disk import DiskUse
from pipeline.plan.plan import Plan
from pipeline.report.outcome import Estimate, Outlook


def summary(plan: Plan) -> list[dict[str, Any]]:
    """The plan in a few rows: what shares an action, a reason and a part of the model, with counts and bytes."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for action in plan.actions.values():
        key = (action.component, action.action, action.reason)
        row = rows.setdefault(
            key,
            {
                "component": action.component,
                "action": action.action,
                "fate": action.action,  # its older name
                "reason": action.reason,
                "tensors": 0,
                "source_bytes": 0,
                "output_bytes": 0,
            },
        )
        row["tensors"] += 1
        row["source_bytes"] += action.tensor.nbytes
        row["output_bytes"] += sum(plan.outputs[name].nbytes for name in action.outputs)
    return sorted(rows.values(), key=lambda row: (row["action"] != "quantize", -row["source_bytes"]))


def _calibration_json(found: CalibrationPlan) -> dict[str, Any]:
    batches = found.batches
    return {
        "captions": found.captions.origin,
        "samples": batches.samples,
        "tokens": batches.tokens,
        "shortest": batches.shortest,
        "longest": batches.longest,
        "cut": batches.cut,
        "batches": len(batches.batches),
        "device": found.device.name,
        "hidden_states": {"place": found.place, "bytes": found.needs.hidden},
        "layer_bytes": found.needs.layer,
        "forwards": len(found.layers) * len(batches.batches),
    }


def _disk_json(disk: DiskUse) -> dict[str, Any]:
    work = disk.scratch_drive
    return {
        "directory": str(disk.drive.directory),
        "free_bytes": disk.drive.free,
        "needed_bytes": disk.needed,
        "written_bytes": disk.written,
        "hidden_states_bytes": disk.scratch,
        "work_directory": None if work is None else {"directory": str(work.directory), "free_bytes": work.free},
    }


def as_json(plan: Plan, estimate: Estimate, outlook: Outlook) -> dict[str, Any]:
    """The whole plan as plain data: every tensor, every place, how long it will take, and what the run would find."""
    source = plan.checkpoint
    return {
        "source": {
            "name": source.label,
            "revision": source.revision,
            "model_type": source.config.get("model_type"),
            "shards": len(source.shards),
            "tensors": len(source.tensors),
            "bytes": source.nbytes,
        },
        "output": {
            "directory": plan.recipe.output,
            "bytes": plan.output_nbytes,
            "shards": [{"file": shard.name, "bytes": shard.size} for shard in plan.shards],
        },
        "language_model": {
            "root": plan.selection.root,
            "layers": plan.selection.layers,
            "outside": list(plan.selection.outside),
        },
        "summary": summary(plan),
        "units": plan.units,
        "threads": plan.threads,
        "peak_memory_bytes": plan.peak_memory,
        "carried": list(source.sidecars),
        "left_behind": [{"file": name, "reason": reason} for name, reason in source.left_behind],
        "warnings": list(plan.warnings),
        "calibration": None if plan.calibration is None else _calibration_json(plan.calibration),
        "estimate": {"seconds": estimate.seconds, "parts": estimate.parts, "basis": estimate.basis},
        "disk": _disk_json(outlook.disk),
        "state": outlook.state,
        "units_done": outlook.units_done,
        "notes": list(outlook.notes),
        "differences": list(outlook.differences),
        "tensors": [
            {
                "name": action.tensor.name,
                "dtype": action.tensor.dtype,
                "shape": list(action.tensor.shape),
                "bytes": action.tensor.nbytes,
                "action": action.action,
                "fate": action.action,  # its older name
                "reason": action.reason,
                "component": action.component,
                "layer": action.layer,
                "outputs": [
                    {**asdict(plan.outputs[name]), "file": plan.shards[plan.outputs[name].shard].name}
                    for name in action.outputs
                ],
            }
            for action in plan.actions.values()
        ],
    }
