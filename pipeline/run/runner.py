"""A run from top to bottom: plan → preflight → stream → finalize → gates → publish."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import library_messages
from pipeline.backends.registry import choose_backend
from pipeline.checkpoint import hub
from pipeline.checkpoint.result import EVENTS, JOURNAL, LOCK, VERDICT, places
from pipeline.checkpoint.writer import is_empty_directory, lost_shards, publish
from pipeline.errors import (
    Interrupted,
    PipelineError,
    UsageError,
    VerificationFailed,
    attempt,
)
from pipeline.events import EventLog, recorded_layers
from pipeline.identity import compare, other_run
from pipeline.journal import (
    Journal,
    begun_to_replace,
    compare_contents,
    discard,
    fingerprint,
    read_identity,
    read_record,
    read_state,
)
from pipeline.machine.memory import peak_rss_bytes
from pipeline.machine.signals import Stop, stop_on_signals
from pipeline.plan.disk import check_disk
from pipeline.plan.plan import Plan, make_plan
from pipeline.report import calibration as calibration_report
from pipeline.report.outcome import Outcome
from pipeline.run.finalize import finalize, record_verdict
from pipeline.run.gates import Candidate, pass_gates
from pipeline.run.moved import Say, contents_of
from pipeline.run.published import listed, published
from pipeline.run.redact import Redaction
from pipeline.serving import profile
from pipeline.serving.command import serve_command
from pipeline.serving.profile_check import profile_in_time
from pipeline.stream.data_free import run_stream, take_back_lost_units
from pipeline.stream.hidden import Scratch
from pipeline.stream.layers import run_layers
from pipeline.stream.totals import Totals
from pipeline.units import size_text
from pipeline.verify.report import Report
from pipeline.verify.verify import find_environment, how_verified
from pipeline.vllm_env.environment import VllmEnvironment
from pipeline.vllm_env.worker import VllmWorker

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from pipeline.report.console import Console


def run(recipe: Recipe, console: Console, fresh: bool = False, announce: bool = True, restart: bool = False) -> Outcome:
    """Convert a checkpoint as the recipe says.

    Args:
        recipe: validated.
        console: what the user sees.
        fresh: replace a result of this program, and throw away what a stopped run of another recipe left. A stopped
            run of this recipe goes on, with or without `fresh`, and then replaces what it was begun to replace.
        announce: say what is imported, and how the result will be verified; a smoke test does that itself.
        restart: throw away what a stopped run finished, whatever recipe it had.

    Raises:
        PipelineError: see `pipeline.errors`; nothing is published then.
    """
    output, partial = places(recipe.output)
    begin = time.monotonic()
    with stop_on_signals() as stop, library_messages.collected():
        checkpoint = hub.resolve(recipe.model.source, recipe.model.revision)
        if announce:
            say_imports(recipe, console)
        plan = make_plan(recipe, checkpoint)
        replace = fresh or begun_to_replace(partial, plan.identity, output)
        if preflight(plan, replace, console.say):
            return published(plan, output, console)
        environment = find_environment(recipe)
        console.show_plan(plan)
        if announce:
            console.say(how_verified(recipe, environment))
        before = read_identity(output) if replace else None
        replaces = fingerprint(before) if before is not None else None
        contents = contents_of(plan, console.say)
        journal = attempt(
            f"opening {partial}", lambda: Journal.open(partial, plan.identity, fresh, restart, replaces, contents)
        )
        try:
            if journal.discarded:
                console.say(f"starting over: what {partial} held is thrown away")
                _scratch(plan, partial).clear()
            if finished(plan, output, replace):  # another process published while this one waited for the lock
                discard(partial)
                return published(plan, output, console)
            with _recorded(plan, journal, stop) as log:
                totals = _stream(plan, journal, log, stop, environment, console)
                attempt(f"writing to {partial}", lambda: finalize(plan, journal, log))
                report = _gates(plan, partial, log, environment, console)
            findings = tuple(calibration_report.findings(plan, journal))
            attempt(f"writing to {partial}", lambda: Redaction(plan).records(partial))
            stop.hold()
            _publish(plan, output, partial, replace)
        finally:
            journal.close()
    return Outcome(
        output, False, recorded_layers(output / EVENTS), totals, report, findings, time.monotonic() - begin,
        (plan.checkpoint.nbytes, plan.output_nbytes), serve_command(output, environment),
    )  # fmt: skip


def say_imports(recipe: Recipe, console: Console) -> None:
    """Why nothing is seen for a while, before the plan of a run that calibrates."""
    if choose_backend(recipe).needs_data:
        console.say("importing torch and transformers, and reading the captions: this takes some seconds")


def preflight(plan: Plan, replace: bool = False, say: Say = lambda text: None) -> bool:
    """Everything that can be refused before the first byte; nothing is written.

    Args:
        plan: of the run.
        replace: a result of this program in `output` will be replaced; also where a stopped run was begun to do so.
        say: told what takes long.

    Returns:
        Whether `output` is this very result already.

    Raises:
        UsageError: the output is not this tool's, another run's, or overlaps with the source.
        PipelineError: the disk is too small.
    """
    output, partial = places(plan.recipe.output)
    replace = replace or begun_to_replace(partial, plan.identity, output)
    refuse_unsound(plan)
    if finished(plan, output, replace, say):
        return True
    attempt("looking at the disk", lambda: check_disk(plan, output, partial))
    return False


def refuse_unsound(plan: Plan) -> None:
    """What is wrong with a recipe wherever its output stands: the serving profile, and places in one another.

    Raises:
        UsageError: one of these.
    """
    output, partial = places(plan.recipe.output)
    # refuses what no stated GPU can hold
    profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes, plan.source_dtypes)
    for place in (output, partial):
        _refuse_overlap(plan, place, "output")
    if plan.recipe.runtime.work_directory is not None:
        work = _scratch(plan, partial).directory
        _refuse_overlap(plan, work, "runtime.work_directory", below=False)
        if {output, partial} & {work, *work.parents}:
            raise UsageError(
                f"runtime.work_directory: {work} is, or lies in, the output", remedy="choose another place"
            )


@contextmanager
def _recorded(plan: Plan, journal: Journal, stop: Stop) -> Iterator[EventLog]:
    """The run's record of events; an interruption within is recorded, and says how to go on."""
    log = EventLog(journal.partial / EVENTS)
    try:
        with library_messages.written(log.write):
            yield log
    except Interrupted:
        if stop.error is not None:
            raise stop.error from None
        log.write("interrupted", units_done=len(journal.done))
        raise Interrupted(
            f"stopped after {len(journal.done)} of {plan.units} units", remedy="run the same command again to go on"
        ) from None
    finally:
        log.close()


# --- stream ------------------------------------------------------------------------------------------


def _stream(
    plan: Plan, journal: Journal, log: EventLog, stop: Stop, environment: VllmEnvironment | None, console: Console
) -> Totals:
    """Write every tensor that is not written yet: those that need no data, then layer by layer.

    Raises:
        Interrupted: by a signal, at the end of a unit, or because vLLM refuses the serving profile.
    """
    partial = journal.partial
    _resume(plan, journal, log, console)
    with (
        profile_in_time(plan, environment, refused=stop.request),
        console.progress(plan, journal) as on_progress,
        stop.deferred(),
    ):
        doing = f"streaming into {partial}"
        totals = attempt(doing, lambda: run_stream(plan, journal, log, stop.requested, on_progress))
        if plan.calibration is not None and not stop.requested.is_set():
            totals += attempt(doing, lambda: run_layers(plan, journal, log, stop.requested, on_progress))
    if stop.requested.is_set():  # also in the last unit: what follows may take long, and the next run does it
        raise Interrupted("interrupted")
    _scratch(plan, partial).clear()
    totals.peak_rss_bytes = max(totals.peak_rss_bytes, peak_rss_bytes())
    log.write("streamed", **totals.as_event())
    return totals


def _resume(plan: Plan, journal: Journal, log: EventLog, console: Console) -> None:
    """Record where the run begins, and say what an earlier one has left to do."""
    for name in take_back_lost_units(plan, journal):
        console.say(f"{journal.partial / name}: missing or short, although finished before; it is written again")
    resumed = len(journal.done)
    log.write("run", pid=os.getpid(), units=plan.units, done=resumed, identity=plan.identity)
    if 0 < resumed < plan.units:
        again = _written_again(plan, journal)
        console.say(
            f"going on after {resumed} of {plan.units} finished units; at most {size_text(again)} are written again"
        )
        log.write("resume", units_done=resumed, bytes_rewritten_at_most=again)


def _scratch(plan: Plan, partial: Path) -> Scratch:
    return Scratch(plan.recipe.output, partial, plan.recipe.runtime.work_directory)


def _written_again(plan: Plan, journal: Journal) -> int:
    """Upper bound of the bytes that a resumed run writes once more: those of the first unit that is not done."""
    redone = next(unit for unit in range(plan.units) if unit not in journal.done)
    if redone < plan.piece_units:
        return sum(piece.result_nbytes for piece in plan.pieces if piece.unit == redone)
    return plan.layers[redone - plan.piece_units].result_nbytes(plan.outputs)


# --- gates and publishing ----------------------------------------------------------------------------


def _gates(plan: Plan, partial: Path, log: EventLog, environment: VllmEnvironment | None, console: Console) -> Report:
    """Send the result through the gates; their report is written beside it, whether or not it passes.

    Raises:
        VerificationFailed: it does not; it stays where it is.
    """
    with VllmWorker(environment) if environment is not None else nullcontext() as worker:
        report = pass_gates(Candidate(partial, plan.checkpoint, plan.recipe, worker, console.say))
    attempt(f"writing to {partial}", lambda: record_verdict(plan, partial, report, log))
    if not report.passed:
        raise VerificationFailed(
            f"{partial}: the result fails verification and is not published; it stays here, with the report in "
            f"{VERDICT}:\n{listed(report.problems)}",
            report=report,
        )
    return report


def _publish(plan: Plan, output: Path, partial: Path, replace: bool) -> None:
    """Give the result its name, by one rename; `replace`: in the place of an earlier result, which is discarded."""
    finished(plan, output, replace)  # what stands there now may be replaced, or is refused
    exchanged = attempt(f"publishing {output}", lambda: publish(partial, output, replace=replace))
    (output / LOCK).unlink(missing_ok=True)
    if exchanged:
        discard(partial)  # the result that was replaced


# --- guards ------------------------------------------------------------------------------------------


def finished(plan: Plan, output: Path, replace: bool, say: Say = lambda text: None) -> bool:
    """Whether `output` is this very result; anything else of that name is refused, unless `replace` allows it."""
    if (not output.exists() and not output.is_symlink()) or is_empty_directory(output):
        return False
    record = read_record(output) if output.is_dir() and not output.is_symlink() else None
    if record is None:
        raise UsageError(
            f"{output}: it exists and is no result of this program", remedy="move it, or choose another output"
        )
    if replace:
        return False
    found = compare(record, plan.identity)
    if found.moved:
        try:
            state = attempt(f"reading {output}", lambda: read_state(output))
        except ValueError:
            raise PipelineError(
                f"{output / JOURNAL}: the journal is damaged", remedy="make the result again with --fresh"
            ) from None
        found = compare_contents(found, state, contents_of(plan, say))
    if found.fields:
        raise other_run(output, found, begun=False)
    if lost := lost_shards(output, plan.shards):
        raise PipelineError(
            f"{output}: {plan.shards[min(lost)].name} is missing or damaged, although this run had finished",
            remedy="make it again with --fresh",
        )
    return True


def _refuse_overlap(plan: Plan, place: Path, key: str, below: bool = True) -> None:
    """The source is never written to; with `below`, it may not lie in `place` either."""
    source, target = plan.checkpoint.root.resolve(), place.resolve()
    if target == source or source in target.parents or (below and target in source.parents):
        raise UsageError(f"{key}: {place} and the source {source} lie in each other; the source is never written to")
