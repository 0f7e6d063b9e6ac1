"""A run from top to bottom: plan → stream → layers → seal → verify → publish."""

from __future__ import annotations

import json
import os
import platform
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import __version__
from pipeline.checkpoint import hub, sidecars
from pipeline.checkpoint.result import FILES, LOCK
from pipeline.checkpoint.source import read_json
from pipeline.checkpoint.writer import lost_shards, publish, sync_all, sync_directory, write_file
from pipeline.errors import (
    Interrupted,
    OtherRun,
    OutOfMemory,
    PipelineError,
    UsageError,
    VerificationFailed,
    from_os_error,
    is_out_of_memory,
)
from pipeline.events import EventLog, layer_timings, read_events
from pipeline.journal import Journal, differences, differing, discard, read_identity
from pipeline.machine.memory import peak_rss_bytes
from pipeline.plan.disk import check_disk
from pipeline.plan.plan import Plan, make_plan
from pipeline.report import calibration as calibration_report
from pipeline.run.finalize import write_config, write_index
from pipeline.serving import profile
from pipeline.serving.verify import verify
from pipeline.stream.data_free import run_stream, take_back_lost_units
from pipeline.stream.hidden import Scratch
from pipeline.stream.layers import run_layers
from pipeline.stream.totals import Calibrated, Totals
from pipeline.units import size_text
from pipeline.verify.report import Report
from pipeline.vllm_env.environment import HOW_TO_GET, Server, find
from pipeline.vllm_env.worker import VllmWorker

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe
    from pipeline.report.console import Console

T = TypeVar("T")
EARLY = 1 << 30  # bytes of a source from which on a start of vLLM, for the profile alone, is little beside the work
LEVELS = ("structure", "load", "generate")  # of `verify`, each further than the one before
VERDICT = "quantize/verify.json"
LIBRARIES = ("compressed-tensors", "llmcompressor", "nvidia-modelopt", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Outcome:
    """How a run ended that did not fail.

    Attributes:
        output: the published directory.
        already: it was there before, from an identical run.
        layers: timings, slowest first.
        totals: of this process; zero where all was done before.
        report: of the verification; None if `already`, and proven far enough before.
        calibrated: what this process read and ran of the layers; None without calibration.
        findings: what the ranges say, for a careful user.
    """

    output: Path
    already: bool
    layers: list[dict[str, Any]]
    totals: Totals
    report: Report | None
    calibrated: Calibrated | None = None
    findings: tuple[str, ...] = ()


def run(recipe: Recipe, console: Console, fresh: bool = False, announce: bool = True) -> Outcome:
    """Convert a checkpoint as the recipe says.

    Args:
        recipe: validated.
        console: what the user sees.
        fresh: throw away what an earlier run left, and replace a result of this program.
        announce: say how the result will be verified; a smoke test does that itself, afterwards.

    Raises:
        PipelineError: see `pipeline.errors`; nothing is published then.
    """
    output, partial = places(recipe)
    with _stop_on_signals() as stop:
        plan = make_plan(recipe, hub.resolve(recipe.model.source, recipe.model.revision))
        if preflight(plan, fresh):
            return _published(plan, output, console)
        server = find_server(recipe)
        if fresh and partial.exists():
            console.say(f"starting over: what {partial} holds is thrown away")
        console.show_plan(plan)
        if announce:
            console.say(how_verified(recipe, server))
        journal = _work(f"opening {partial}", lambda: Journal.open(partial, plan.identity, fresh))
        try:
            if fresh:
                Scratch(plan, partial).clear()
            if _finished(plan, output, fresh):  # another process published while this one waited for the lock
                discard(partial)
                return _published(plan, output, console)
            totals, report, calibrated = _convert(plan, journal, console, stop, server)
            findings = tuple(calibration_report.findings(plan, journal))
            stop.hold()
            _finished(plan, output, fresh)  # what stands there now may be replaced, or is refused
            exchanged = _work(f"publishing {output}", lambda: publish(partial, output, replace=fresh))
            (output / LOCK).unlink(missing_ok=True)
            if exchanged:
                discard(partial)  # the result that --fresh replaces
        finally:
            journal.close()
    return Outcome(output, False, _layers(output), totals, report, calibrated, findings)


def places(recipe: Recipe) -> tuple[Path, Path]:
    """Where the result will be, and where it is made."""
    output = Path(recipe.output).expanduser().absolute()
    return output, output.with_name(output.name + ".partial")


def preflight(plan: Plan, fresh: bool = False) -> bool:
    """Everything that can be refused before the first byte; nothing is written.

    Returns:
        Whether `output` is this very result already.

    Raises:
        UsageError: the output is not ours, another run's, or overlaps with the source.
        PipelineError: the disk is too small.
    """
    output, partial = places(plan.recipe)
    profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes)  # refuses what no stated GPU can hold
    for place in (output, partial):
        _refuse_overlap(plan, place, "output")
    if plan.recipe.runtime.work_directory is not None:
        work = Scratch(plan, partial).directory
        _refuse_overlap(plan, work, "runtime.work_directory", below=False)
        if {output, partial} & {work, *work.parents}:
            raise UsageError(f"runtime.work_directory: {work} is, or lies in, the output; choose another place")
    if _finished(plan, output, fresh):
        return True
    _work("looking at the disk", lambda: check_disk(plan, output, partial))
    return False


def find_server(recipe: Recipe) -> Server | None:
    """The vLLM that will prove the result; None where the recipe asks for none, or there is none.

    Raises:
        UsageError: the one that is named, or one that is in its usual place, does not work.
    """
    return None if recipe.verify == "structure" else find(recipe.runtime.vllm_python)


def how_verified(recipe: Recipe, server: Server | None) -> str:
    """A line for the user, before the work: what the result will have passed."""
    if recipe.verify == "structure":
        return "verify: structure; the result will not be proven in vLLM"
    if server is None:
        return (
            f"note: verify: {recipe.verify} needs vLLM, and none is installed: the structure alone will be verified, "
            f"the result is not proven in vLLM; {HOW_TO_GET}"
        )
    return f"verify: {recipe.verify}, in {server.name}"


def _published(plan: Plan, output: Path, console: Console) -> Outcome:
    """A result that is there already, with the serving profile and as far proven as this recipe asks.

    Neither is part of a run's identity: nothing is converted again for them.

    Raises:
        PipelineError: a small file is not what the run wrote.
        VerificationFailed: the result does not pass what it was not asked to pass before, or has failed what is not
            asked now.
    """
    changed = sidecars.changed_files(output) if (output / FILES).exists() else []
    if changed:
        raise PipelineError(f"{output}: {changed[0]}; put it back, or make the result again with --fresh")
    server = find_server(plan.recipe)
    try:
        before = read_json(output / VERDICT)
    except PipelineError:
        before = {}
    _refuse_failed(plan, output, before, server)
    _write_profile(plan, output, console, server)
    report = _prove_further(plan, output, console, before, server)
    return Outcome(output, True, _layers(output), Totals(), report)


def _asked(before: dict[str, Any]) -> int:
    """How far an earlier verification was to go, as a place in `LEVELS`; -1 where its record does not tell."""
    asked = before.get("asked", before.get("level"))
    return LEVELS.index(asked) if asked in LEVELS else -1


def _refuse_failed(plan: Plan, output: Path, before: dict[str, Any], server: Server | None) -> None:
    """A result that has failed does not pass by being asked less, or where there is no vLLM any more."""
    asked = _asked(before)
    less = asked > LEVELS.index(plan.recipe.verify) or (asked > 0 and server is None and before.get("vllm"))
    if before.get("passed") is False and less:
        raise VerificationFailed(
            f"{output}: it is published, but has failed verify: {LEVELS[asked]}; do not serve it, verify it as far "
            f"again, or make it again with --fresh:\n{_listed(before.get('problems') or [])}"
        )


def _prove_further(
    plan: Plan, output: Path, console: Console, before: dict[str, Any], server: Server | None
) -> Report | None:
    """Verify a published result that was verified less far than is asked now, or when there was no vLLM."""
    path, far = output / VERDICT, _asked(before) >= LEVELS.index(plan.recipe.verify)
    if before.get("passed") and (plan.recipe.verify == "structure" or server is None or (far and before.get("vllm"))):
        return None
    with VllmWorker(server) if server is not None else nullcontext() as session:
        report = verify(output, plan.checkpoint, plan.recipe.verify, session, say=console.say)
    report.checkpoint = output.name
    _work(f"writing {path}", lambda: write_file(path, _json(report.as_json())))
    if not report.passed:
        raise VerificationFailed(
            f"{output}: it is published, but fails verification; do not serve it, make it again with --fresh:\n"
            f"{_listed(report.problems)}"
        )
    return report


def _listed(problems: list[str]) -> str:
    return "\n".join(f"  {problem}" for problem in problems[:20])


def _write_profile(plan: Plan, output: Path, console: Console, server: Server | None) -> None:
    text = profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes)
    path = output / profile.FILE
    if path.exists() and _work(f"reading {path}", path.read_bytes) == text.encode():
        return
    said = "" if server is None else f", which {server.name} takes"
    if server is not None:
        with VllmWorker(server) as session:
            answer = _hold_against(session, text, output)
        if answer["error"]:
            said = f"; it was not held against {server.name}: {answer['error']}"
        elif answer["problem"]:
            raise UsageError(f"serve: {server.name} refuses the profile: {answer['problem']}; {path} stays as it was")
    _work(f"writing {path}", lambda: write_file(path, text.encode()))
    console.say(f"{path}: written anew, as the recipe's serve section now says{said}")


def _hold_against(session: VllmWorker, text: str, checkpoint: Path) -> dict[str, Any]:
    """A profile against the arguments of a vLLM; see in_vllm/arguments.py. Of the checkpoint the config is read."""
    with tempfile.TemporaryDirectory(prefix="profile-") as place:
        path = Path(place) / Path(profile.FILE).name
        path.write_text(text, encoding="utf-8")
        (answer,) = session.run([{"kind": "arguments", "profile": str(path), "checkpoint": str(checkpoint.absolute())}])
    return answer


@contextmanager
def _profile_in_time(plan: Plan, server: Server | None) -> Iterator[Callable[[], None]]:
    """Beside long work: vLLM's word on the profile, seconds after the start and not hours later.

    Yields:
        What raises UsageError once vLLM has refused it; a run that is short learns it from the verification.
    """
    if server is None or plan.read_nbytes < EARLY:
        yield lambda: None
        return
    text = profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes)
    with ThreadPoolExecutor(1, thread_name_prefix="profile") as beside, ExitStack() as running:
        # begun here: Linux ends vLLM's process with the thread that started it
        session = running.enter_context(VllmWorker(server)).begin()
        asked = beside.submit(_hold_against, session, text, plan.checkpoint.root)

        def look() -> None:
            if not asked.done():
                return
            running.close()  # gives its memory back
            answer = asked.result() if asked.exception() is None else {}
            if not answer.get("error") and (problem := answer.get("problem")):
                raise UsageError(
                    f"serve: {server.name} refuses the profile: {problem}; mend it and run the same command to go on"
                )

        yield look


def _convert(
    plan: Plan, journal: Journal, console: Console, stop: Stop, server: Server | None
) -> tuple[Totals, Report, Calibrated | None]:
    partial = journal.partial
    log = EventLog(partial / "quantize" / "events.jsonl")
    try:
        for name in take_back_lost_units(plan, journal):
            console.say(f"{partial / name}: missing or short, although finished before; it is written again")
        resumed = len(journal.done)
        log.write("run", pid=os.getpid(), units=plan.units, done=resumed, identity=plan.identity)
        if 0 < resumed < plan.units:
            again = _written_again(plan, journal)
            console.say(
                f"going on after {resumed} of {plan.units} finished units; at most {size_text(again)} are written again"
            )
            log.write("resume", units_done=resumed, bytes_rewritten_at_most=again)
        calibrated: Calibrated | None = None
        with (
            _profile_in_time(plan, server) as look,
            console.progress(plan, journal) as show_progress,
            stop.deferred(),
        ):

            def on_progress(label: str, nbytes: int) -> None:
                show_progress(label, nbytes)
                look()

            doing = f"streaming into {partial}"
            totals = _work(doing, lambda: run_stream(plan, journal, log, stop.requested, on_progress))
            if plan.calibration is not None and not stop.requested.is_set():
                calibrated = _work(doing, lambda: run_layers(plan, journal, log, stop.requested, on_progress, totals))
        if stop.requested.is_set():  # also in the last unit: what follows may take long, and the next run does it
            raise Interrupted("interrupted")
        Scratch(plan, partial).clear()
        totals.peak_rss_bytes = max(totals.peak_rss_bytes, peak_rss_bytes())
        log.write("streamed", **vars(totals))
        _work(f"writing to {partial}", lambda: _seal(plan, journal, log))
        with VllmWorker(server) if server is not None else nullcontext() as session:
            report = verify(partial, plan.checkpoint, plan.recipe.verify, session, say=console.say)
        report.checkpoint = Path(plan.recipe.output).name  # as it will be called
        _work(f"writing to {partial}", lambda: _record_verdict(partial, report, log))
        if not report.passed:
            raise VerificationFailed(
                f"{partial}: the result fails verification and is not published; it stays here, with the report in "
                f"{VERDICT}:\n{_listed(report.problems)}"
            )
    except Interrupted:
        log.write("interrupted", units_done=len(journal.done))
        raise Interrupted(
            f"stopped after {len(journal.done)} of {plan.units} units; run the same command again to go on"
        ) from None
    finally:
        log.close()
    return totals, report, calibrated


def _written_again(plan: Plan, journal: Journal) -> int:
    """Upper bound of the bytes that a resumed run writes once more: those of the first unit that is not done."""
    redone = next(unit for unit in range(plan.units) if unit not in journal.done)
    if redone < plan.piece_units:
        return sum(piece.result_nbytes for piece in plan.pieces if piece.unit == redone)
    return plan.layers[redone - plan.piece_units].result_nbytes(plan.outputs)


# --- seal --------------------------------------------------------------------------------------------


def _seal(plan: Plan, journal: Journal, log: EventLog) -> None:
    """Everything beside the weights; config.json and the index last, so that nothing looks whole before it is."""
    from pipeline.recipe.recipe import recipe_yaml
    from pipeline.report.card import model_card

    partial = journal.partial
    sidecars.carry_files(plan.checkpoint, partial)
    write_file(partial / "README.md", model_card(plan, calibration_report.findings(plan, journal)).encode())
    write_file(partial / profile.FILE, profile.write(plan.recipe, plan.checkpoint.config, plan.output_nbytes).encode())
    write_file(partial / "quantize" / "recipe.yaml", recipe_yaml(plan.recipe).encode())
    write_file(partial / "quantize" / "versions.json", _json(_versions()))
    write_file(partial / "quantize" / "layers.json", _json(_layers(partial)))
    if plan.calibration is not None:
        write_file(partial / "quantize" / "calibration.json", _json(calibration_report.as_json(plan, journal)))
    write_config(plan, partial)
    write_index(plan, partial)
    sync_all(path for path in partial.rglob("*") if path.is_file())
    sync_directory(partial)
    log.write("sealed", bytes=plan.output_nbytes)


def _record_verdict(partial: Path, report: Report, log: EventLog) -> None:
    write_file(partial / VERDICT, _json(report.as_json()))
    log.write("verified", passed=report.passed, problems=report.problems, proven_in_vllm=report.proven_in_vllm)


def _versions() -> dict[str, str]:
    found = {"fp8-pipeline": __version__, "python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _layers(directory: Path) -> list[dict[str, Any]]:
    path = directory / "quantize" / "events.jsonl"
    return layer_timings(read_events(path)) if path.exists() else []


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- guards ------------------------------------------------------------------------------------------


def _finished(plan: Plan, output: Path, fresh: bool) -> bool:
    """Whether `output` is this very result; anything else of that name is refused, unless `fresh` may replace it."""
    if not output.exists() and not output.is_symlink():
        return False
    found = read_identity(output) if output.is_dir() and not output.is_symlink() else None
    if found is None:
        raise UsageError(f"{output}: it exists and is no result of this program; move it, or choose another output")
    if fresh:
        return False
    if found != plan.identity:
        changed = "\n".join(f"  {line}" for line in differences(found, plan.identity))
        raise OtherRun(
            f"{output}: it is the result of another run, which differs in\n{changed}\n"
            "choose another output, or replace it with --fresh",
            differing(found, plan.identity),
            begun=False,
        )
    if lost := lost_shards(output, plan.shards):
        raise PipelineError(
            f"{output}: {plan.shards[min(lost)].name} is missing or damaged, although this run had finished; "
            "make it again with --fresh"
        )
    return True


def _refuse_overlap(plan: Plan, place: Path, key: str, below: bool = True) -> None:
    """The source is never written to; with `below`, it may not lie in `place` either."""
    source, target = plan.checkpoint.root.resolve(), place.resolve()
    if target == source or source in target.parents or (below and target in source.parents):
        raise UsageError(f"{key}: {place} and the source {source} lie in each other; the source is never written to")


def _work(doing: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except OSError as error:
        raise from_os_error(error, doing) from None
    except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"memory ran out while {doing} ({_first_line(error)}); free some, or lower calibration.batch_tokens, "
            "runtime.threads or runtime.device_memory"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- signals -----------------------------------------------------------------------------------------


class Stop:
    """SIGINT, SIGTERM and SIGHUP: at once, or while streaming at the end of a unit, or never while publishing."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.forced = False
        self._deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        # a terminal that is closed may send SIGHUP twice, and nobody has grown impatient
        if not self._deferred or (self.requested.is_set() and number != signal.SIGHUP):
            self.forced = True
            raise KeyboardInterrupt
        self.requested.set()

    def hold(self) -> None:
        """From now on a signal waits; the second one still ends everything."""
        self._deferred = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal asks for an end; only a second one forces it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


@contextmanager
def _stop_on_signals() -> Iterator[Stop]:
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield stop
    except Exception:
        if stop.forced:  # within an import, for instance, KeyboardInterrupt becomes an error of the library's
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
