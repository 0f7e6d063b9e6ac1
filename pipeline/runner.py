"""A run from top to bottom: plan → stream → layers → seal → verify → publish."""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline import __version__
from pipeline.calibration.hidden import Scratch
from pipeline.calibration.layers import Calibrated, run_layers
from pipeline.checkpoint import hub, sidecars
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
from pipeline.events import EventLog, layer_timings, peak_rss_bytes, read_events
from pipeline.journal import LOCK, Journal, discard, read_identity
from pipeline.plan import Plan, check_disk, differences, differing, make_plan, size_text
from pipeline.report import calibration as calibration_report
from pipeline.serving import profile
from pipeline.serving.server import HOW_TO_GET, Server, Session, find
from pipeline.serving.structure import Report
from pipeline.serving.verify import verify
from pipeline.stream import Totals, run_stream, take_back_lost_units

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.report.console import Console

T = TypeVar("T")
LIBRARIES = ("compressed-tensors", "llmcompressor", "nvidia-modelopt", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Outcome:
    """How a run ended that did not fail.

    Attributes:
        output: the published directory.
        already: it was there before, from an identical run.
        layers: timings, slowest first.
        totals: of this process; zero where all was done before.
        report: of the verification; None if `already`.
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
            return Outcome(output, True, _layers(output), Totals(), None)
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
                return Outcome(output, True, _layers(output), Totals(), None)
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
        UsageError: the one that is named does not exist.
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
        with console.progress(plan, journal) as on_progress, stop.deferred():
            doing = f"streaming into {partial}"
            totals = _work(doing, lambda: run_stream(plan, journal, log, stop.requested, on_progress))
            if stop.requested.is_set() and len(journal.done) < plan.units:
                raise Interrupted("interrupted")
            if plan.calibration is not None:
                calibrated = _work(doing, lambda: run_layers(plan, journal, log, stop.requested, on_progress, totals))
        Scratch(plan, partial).clear()
        totals.peak_rss_bytes = max(totals.peak_rss_bytes, peak_rss_bytes())
        log.write("streamed", **vars(totals))
        _work(f"writing to {partial}", lambda: _seal(plan, journal, log))
        with Session(server) if server is not None else nullcontext() as session:
            report = verify(partial, plan.checkpoint, plan.recipe.verify, session, say=console.say)
        report.checkpoint = Path(plan.recipe.output).name  # as it will be called
        _work(f"writing to {partial}", lambda: _record_verdict(partial, report, log))
        if not report.passed:
            raise VerificationFailed(
                "\n".join(
                    [
                        f"{partial}: the result fails verification and is not published; it stays here, with "
                        "the report in quantize/verify.json:"
                    ]
                    + [f"  {problem}" for problem in report.problems[:20]]
                )
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
    from pipeline.recipe import recipe_yaml
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
    sidecars.write_config(plan, partial)
    sidecars.write_index(plan, partial)
    sync_all(path for path in partial.rglob("*") if path.is_file())
    sync_directory(partial)
    log.write("sealed", bytes=plan.output_nbytes)


def _record_verdict(partial: Path, report: Report, log: EventLog) -> None:
    write_file(partial / "quantize" / "verify.json", _json(report.as_json()))
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
    """SIGINT and SIGTERM: at once, or while streaming at the end of a unit, or never while publishing."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.forced = False
        self._deferred = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if not self._deferred or self.requested.is_set():
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
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except Exception:
        if stop.forced:  # within an import, for instance, KeyboardInterrupt becomes an error of the library's
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
