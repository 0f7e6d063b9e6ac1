"""Is this machine fit for the run? Findings, each with its remedy; nothing is changed.

`examine` asks the machine (machine.py), the drives (drives.py) and the libraries (libraries.py), which all read through
`machine.system.System`: a tree of files can stand for a machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.result import places
from pipeline.doctor import drives, libraries, machine
from pipeline.doctor.finding import Finding, Status
from pipeline.errors import PipelineError
from pipeline.machine.gpus import gpus
from pipeline.machine.system import System
from pipeline.plan.plan import make_plan
from pipeline.run.runner import preflight
from pipeline.units import size_text

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan
    from pipeline.recipe.recipe import Recipe
    from pipeline.report.console import Console

__all__ = ["Finding", "Status", "as_json", "examine", "exit_status", "show"]


def examine(
    recipe: Recipe | None = None,
    root: Path = Path("/"),
    environment: Mapping[str, str] | None = None,
    measure: bool = True,
    site: Sequence[str] | None = None,
) -> list[Finding]:
    """Look at everything that a run will meet.

    Args:
        recipe: the run; None: the machine alone.
        root: where ``proc`` and ``sys`` are.
        environment: variables; None: this process's.
        measure: write and read a scratch file, and read a shard, for the drives' rates.
        site: directories with libraries; None: this process's.
    """
    system = System.here(root, environment, site)
    planned, plan = _plan(system, recipe) if recipe is not None else ([], None)
    cache, seen = libraries.hub_cache(system), gpus(system)
    found = [
        *machine.gpu_findings(system, seen, recipe, plan),
        *machine.memory_findings(system, plan),
        *machine.processor_findings(system, recipe),
        *machine.limit_findings(system, plan),
        *machine.wsl_findings(system, seen),
        *drives.drive_findings(system, recipe, plan, cache, measure),
        *libraries.variable_findings(system, recipe),
        *libraries.library_findings(system),
        *libraries.vllm_findings(recipe, bool(seen.found)),
        *planned,
    ]
    room = any(finding.area in ("output", "work") and finding.status == "unfit" for finding in found)
    if plan is not None and not room:  # else the same would be said twice
        found += _refusals(plan)
    return found


def exit_status(findings: Sequence[Finding]) -> int:
    """1 where something will not work, else 0."""
    return int(any(finding.status == "unfit" for finding in findings))


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs: the verdict, and every finding."""
    counts: dict[str, int] = {status: sum(finding.status == status for finding in findings) for status in _STATUSES}
    return {"fit": not exit_status(findings), **counts, "findings": [asdict(finding) for finding in findings]}


_STATUSES: tuple[Status, ...] = ("ok", "note", "warning", "unfit")


def show(findings: Sequence[Finding], console: Console) -> None:
    """For a reader: a line a finding, its remedy below, the verdict last."""
    width = max((len(finding.area) for finding in findings), default=0)
    for finding in findings:
        lines = finding.text.splitlines()
        console.say(f"{finding.status:<7}  {finding.area:<{width}}  {lines[0]}")
        for line in lines[1:]:
            console.say(f"{'':<7}  {'':<{width}}  {line}")
        if finding.remedy is not None:
            console.say(f"{'':<7}  {'':<{width}}  → {finding.remedy}")
    counts = as_json(findings)
    console.say(
        f"{'fit' if counts['fit'] else 'UNFIT'}: {counts['unfit']} that will not work, {counts['warning']} warning(s), "
        f"{counts['note']} note(s)"
    )


# --- the recipe --------------------------------------------------------------------------------------


def _plan(system: System, recipe: Recipe) -> tuple[list[Finding], Plan | None]:
    from pipeline.checkpoint import hub

    name = recipe.model.source
    by = libraries.offline(system)
    is_hub_id = hub.HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().exists()
    if by is not None and is_hub_id and not libraries.in_cache(system, name):
        cache = libraries.hub_cache(system)
        text = f"model.source: {name} is not in {cache}, and {by} keeps it from being fetched"
        remedy = f"unset {by}, or fetch it where there is a network: hf download {name}; or name a directory"
        return [Finding("source-not-cached", "recipe", "unfit", text, remedy)], None
    try:
        plan = make_plan(recipe, hub.resolve(name, recipe.model.revision, headers_only=True))
    except PipelineError as error:
        return list(_of_error(error)), None
    except Exception as error:  # a library that does not import is what one asks a doctor about
        line = (str(error).strip().splitlines() or [""])[0]
        text = f"the plan cannot be made: {type(error).__name__}: {line}"
        return [Finding("plan-broken", "recipe", "unfit", text, "fix the installation: bash scripts/setup.sh")], None
    text = (
        f"{plan.checkpoint.label}: {size_text(plan.checkpoint.nbytes)} become {size_text(plan.output_nbytes)} in "
        f"{places(recipe.output)[0]}, memory at most {size_text(plan.peak_memory)}, {plan.threads} thread(s)"
    )
    found = [Finding("plan-made", "recipe", "ok", text)]
    if plan.calibration is not None:
        found.append(
            Finding(
                "layers-placed",
                "recipe",
                "ok",
                f"layers run on {plan.calibration.device.why}; {plan.calibration.place_why}",
            )
        )
    return found, plan


def _refusals(plan: Plan) -> Iterator[Finding]:
    """What the run itself would refuse before its first byte."""
    try:
        if preflight(plan):
            yield Finding(
                "already-done", "recipe", "note", f"{places(plan.recipe.output)[0]}: done already, by an identical run"
            )
    except PipelineError as error:
        yield from _of_error(error)


def _of_error(error: PipelineError) -> Iterator[Finding]:
    yield Finding("run-refused", "recipe", "unfit", error.message, error.remedy)
