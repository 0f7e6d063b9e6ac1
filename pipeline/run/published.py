"""A result that is there already: kept, verified further, or refused."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import sidecars
from pipeline.checkpoint.result import CARD, EVENTS, FILES, PROFILE, VERDICT
from pipeline.checkpoint.source import read_json
from pipeline.checkpoint.writer import write_file
from pipeline.errors import PipelineError, UsageError, VerificationFailed, attempt
from pipeline.events import EventLog, read_events, recorded_layers
from pipeline.plan.plan import Plan
from pipeline.report.outcome import Outcome
from pipeline.run.finalize import card_text, write_verdict
from pipeline.run.gates import Candidate, pass_gates
from pipeline.serving import profile
from pipeline.serving.command import serve_command
from pipeline.serving.profile_check import hold_against
from pipeline.stream.totals import Totals
from pipeline.verify.report import LEVELS, Report
from pipeline.verify.verify import find_environment
from pipeline.vllm_env.environment import VllmEnvironment
from pipeline.vllm_env.worker import VllmWorker

if TYPE_CHECKING:
    from pipeline.report.console import Console


def published(plan: Plan, output: Path, console: Console) -> Outcome:
    """A result that is there already, with the serving profile, and verified as far as this recipe asks.

    Neither is part of a run's identity: nothing is converted again for them.

    Raises:
        PipelineError: a small file is not what the run wrote.
        VerificationFailed: the result does not pass what it was not asked to pass before, or has failed what is not
            asked now.
    """
    changed = sidecars.changed_files(output) if (output / FILES).exists() else {}
    for name, what in changed.items():
        raise PipelineError(f"{output}: {name}: {what}", remedy="put it back, or make the result again with --fresh")
    environment = find_environment(plan.recipe)
    try:
        before = read_json(output / VERDICT)
    except PipelineError:
        before = {}
    _refuse_failed(plan, output, before, environment)
    _write_profile(plan, output, console, environment)
    report = _verify_further(plan, output, console, before, environment)
    _write_card(plan, output, console)
    if report is not None and not report.passed:
        raise VerificationFailed(
            f"{output}: it is published, but fails verification; do not serve it, make it again with --fresh:\n"
            f"{listed(report.problems)}"
        )
    serve = serve_command(output, environment)
    return Outcome(output, True, recorded_layers(output / EVENTS), Totals(), report, serve=serve)


def _asked(before: dict[str, Any]) -> int:
    """How far an earlier verification was to go, as a place in `LEVELS`; -1 where its record does not tell."""
    asked = before.get("asked", before.get("level"))
    return LEVELS.index(asked) if asked in LEVELS else -1


def _refuse_failed(plan: Plan, output: Path, before: dict[str, Any], environment: VllmEnvironment | None) -> None:
    """A result that has failed does not pass by being asked less, or where there is no vLLM any more."""
    asked = _asked(before)
    less = asked > LEVELS.index(plan.recipe.verify) or (asked > 0 and environment is None and before.get("vllm"))
    if before.get("passed") is False and less:
        raise VerificationFailed(
            f"{output}: it is published, but has failed verify: {LEVELS[asked]}; do not serve it, verify it as far "
            f"again, or make it again with --fresh:\n{listed(before.get('problems') or [])}"
        )


def _verify_further(
    plan: Plan, output: Path, console: Console, before: dict[str, Any], environment: VllmEnvironment | None
) -> Report | None:
    """Verify a published result that was verified less far than is asked now, or when there was no vLLM."""
    path, far = output / VERDICT, _asked(before) >= LEVELS.index(plan.recipe.verify)
    no_vllm = plan.recipe.verify == "structure" or environment is None
    if before.get("passed") and (no_vllm or (far and before.get("vllm"))):
        return None
    with VllmWorker(environment) if environment is not None else nullcontext() as worker:
        report = pass_gates(Candidate(output, plan.checkpoint, plan.recipe, worker, console.say))
    attempt(f"writing {path}", lambda: write_verdict(plan, output, report))
    return report


def _write_card(plan: Plan, output: Path, console: Console) -> None:
    """The model card anew, where verdict, serve or card section say something else; one that was edited stays."""
    path = output / CARD
    try:
        text = attempt(f"reading {output}", lambda: card_text(plan, output))
    except (PipelineError, KeyError, TypeError) as error:  # a record is damaged; the weights are not
        console.say(f"{path}: it stays as it is, since a record that it is made of cannot be read: {error}")
        return
    events = read_events(output / EVENTS) if (output / EVENTS).exists() else ()
    written = [event["sha256"] for event in events if event.get("event") == "card"]
    if path.exists():
        found = attempt(f"reading {path}", path.read_bytes)
        if found == text or not written:  # by a version that did not say what it wrote
            return
        if hashlib.sha256(found).hexdigest() != written[-1]:
            console.say(f"{path}: it was edited, and stays as it is; remove it to have it written anew")
            return

    def write() -> None:
        write_file(path, text)
        log = EventLog(output / EVENTS)
        log.write("card", sha256=hashlib.sha256(text).hexdigest())
        log.close()

    attempt(f"writing {path}", write)
    console.say(f"{path}: the model card is written anew")


def listed(problems: list[str]) -> str:
    """Problems for the text of an error: a line each, indented, twenty at most."""
    return "\n".join(f"  {problem}" for problem in problems[:20])


def _write_profile(plan: Plan, output: Path, console: Console, environment: VllmEnvironment | None) -> None:
    text = profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes, plan.source_dtypes)
    path = output / PROFILE
    if path.exists() and attempt(f"reading {path}", path.read_bytes) == text.encode():
        return
    said = "" if environment is None else f", which {environment.name} takes"
    if environment is not None:
        with VllmWorker(environment) as worker:
            answer = hold_against(worker, text, output, plan.output_nbytes)
        if answer["error"]:
            said = f"; it was not held against {environment.name}: {answer['error']}"
        elif answer["problem"]:
            refusal = f"serve: {environment.name} refuses the profile: {answer['problem']}"
            raise UsageError(f"{refusal}; {path} stays as it was")
    attempt(f"writing {path}", lambda: write_file(path, text.encode()))
    console.say(f"{path}: written anew, as the recipe's serve section now says{said}")
