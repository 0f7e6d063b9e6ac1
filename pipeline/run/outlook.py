"""What a run would find at its output now: a plan shows it beside what it plans, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.result import places
from pipeline.errors import OtherRun, PipelineError, attempt
from pipeline.journal import begun_to_replace, finished_units
from pipeline.plan.disk import check_disk, disk_use
from pipeline.plan.plan import Plan
from pipeline.report.outcome import Outlook, OutlookState
from pipeline.run.runner import finished, refuse_unsound

Differences = tuple[dict[str, Any], ...]


def outlook(plan: Plan) -> Outlook:
    """What `quantize RECIPE`, without further options, would find now.

    Raises:
        UsageError: the recipe could not be run whatever its output held; see `refuse_unsound`.
        PipelineError: a drive cannot be looked at.
    """
    output, partial = places(plan.recipe.output)
    refuse_unsound(plan)
    state, notes, done, differences = _found(plan, output, partial)
    disk = attempt("looking at the disk", lambda: disk_use(plan, output, partial))
    refusal = None
    if state != "published":
        try:
            attempt("looking at the disk", lambda: check_disk(plan, output, partial))
        except PipelineError as error:
            refusal = error
    return Outlook(state, tuple(notes), done, disk, refusal, differences)


def _found(plan: Plan, output: Path, partial: Path) -> tuple[OutlookState, list[str], int, Differences]:
    """The state, what is to be said of it, how many units are finished, and what differs from another run's recipe."""
    replaces = begun_to_replace(partial, plan.identity, output)
    notes: list[str] = []
    differences: Differences = ()
    state: OutlookState = "new"
    try:
        if finished(plan, output, replaces):
            text = f"{output}: published already, by an identical run; quantize RECIPE converts nothing"
            return "published", [f"{text}, with --fresh everything once more"], plan.units, ()
    except PipelineError as error:
        differences = error.differences if isinstance(error, OtherRun) else ()
        state, notes = "refused", [f"quantize RECIPE would be refused: {error}"]
    try:
        done = attempt(f"reading {partial}", lambda: finished_units(partial, plan.identity)) or 0
    except PipelineError as error:
        differences = differences or (error.differences if isinstance(error, OtherRun) else ())
        return "refused", [*notes, f"quantize RECIPE would be refused: {error}"], 0, differences
    if done and state == "new":
        state = "begun"
        goes_on = f"{partial}: an earlier run has finished {done} of {plan.units} units; quantize RECIPE goes on there"
        notes.append(f"{goes_on}, and replaces the result at {output}" if replaces else goes_on)
    return state, notes, done, differences
