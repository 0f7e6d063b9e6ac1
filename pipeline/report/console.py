"""What the user sees: a progress display on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.events import STAGES
from pipeline.plan.plan import Plan
from pipeline.report.plan import summary
from pipeline.report.tables import Column, fitted
from pipeline.units import size_text, time_text

if TYPE_CHECKING:
    import rich.console

    from pipeline.journal import Journal
    from pipeline.report.outcome import Estimate, Outcome, Outlook, Smoke
    from pipeline.stream.totals import Totals
    from pipeline.verify.report import Report

PLAIN_INTERVAL = 10.0  # seconds between progress lines in a log
MOST_FINDINGS = 12
LOG_WIDTH = 140  # of tables where there is no terminal
PARTS = {"stream": "streaming", "weights": "weights of layers", "verify": "verification"}  # others have their own name


class Console:
    """Everything goes to standard output; errors are the command line's business.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        import rich.console

        class Steadfast(rich.console.Console):
            """A console whose reader may leave (``| head``) without ending the work."""

            def on_broken_pipe(self) -> None:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)  # what is buffered must not raise again at the end
                os.close(null)
                self.quiet = True

        self.rich: rich.console.Console = Steadfast(highlight=False, quiet=quiet)
        if not self.rich.is_terminal:
            self.rich.width = LOG_WIDTH

    def say(self, text: str, whole: bool = False) -> None:
        """A sentence; a terminal breaks it between words.

        Args:
            text: shown as it is.
            whole: nothing is put into it, so that a command can be copied.
        """
        self.rich.print(text, markup=False, soft_wrap=whole or not self.rich.is_terminal)

    def say_verdict(self, before: str, verdict: str, passed: bool, after: str = "") -> None:
        """A sentence whose verdict is in colour where colours are on."""
        from rich.text import Text

        text = Text.assemble(before, (verdict, "bold green" if passed else "bold red"), after)
        self.rich.print(text, soft_wrap=not self.rich.is_terminal)

    # --- before ---

    def show_plan(self, plan: Plan) -> None:
        """The plan in two lines, and its warnings."""
        source = plan.checkpoint
        self.say(
            f"{source.label}: {len(source.tensors)} tensors in {len(source.shards)} shard(s), "
            f"{size_text(source.nbytes)}; {plan.selection.layers} decoder layers at {plan.selection.stack}"
        )
        taken = [action.action for action in plan.actions.values()]
        counts = {kind: taken.count(kind) for kind in ("quantize", "copy", "drop")}
        self.say(
            f"{counts['quantize']} tensors become {plan.backend.format.weight_type}, {counts['copy']} stay as they are"
            + (f", {counts['drop']} dropped" if counts["drop"] else "")
            + f"; output {size_text(plan.output_nbytes)} in {len(plan.shards)} shard(s), "
            f"memory at most {size_text(plan.peak_memory)}, {plan.threads} thread(s)"
        )
        if plan.calibration is not None:
            self._show_calibration(plan)
        for warning in plan.warnings:
            self.say(f"note: {warning}")

    def _show_calibration(self, plan: Plan) -> None:
        assert plan.calibration is not None
        found, batches = plan.calibration, plan.calibration.batches
        self.say(
            f"calibration: {batches.samples} captions of {found.captions.origin}, {batches.tokens} tokens "
            f"({batches.shortest} to {batches.longest} each, {batches.cut} cut) in {len(batches.batches)} batches"
        )
        self.say(f"layers run on {found.device.why}; {found.place_why}")

    def show_plan_table(self, plan: Plan) -> None:
        """What `quantize plan` prints: parts, shards, what is copied."""
        self.show_plan(plan)
        columns = [
            Column("part", lambda row: row["component"], right=False),
            Column("action", lambda row: row["action"], right=False),
            Column("why", lambda row: row["reason"], rank=4, right=False),
            Column("tensors", lambda row: str(row["tensors"]), rank=2),
            Column("source", lambda row: size_text(row["source_bytes"]), rank=1),
            Column("output", lambda row: size_text(row["output_bytes"]), rank=1),
        ]
        self.rich.print(fitted(summary(plan), columns, self.rich.width, title="every tensor's action"))
        counted = Counter(output.shard for output in plan.outputs.values())
        shards = [
            Column("file", lambda row: row[1].name, right=False),
            Column("tensors", lambda row: str(counted[row[0]]), rank=1),
            Column("size", lambda row: size_text(row[1].size)),
        ]
        title = f"output shards in {plan.recipe.output}"
        self.rich.print(fitted(list(enumerate(plan.shards)), shards, self.rich.width, title=title))
        copied = [name for name in plan.checkpoint.sidecars if name != "config.json"]
        self.say("config.json: the source's, with a quantization_config")
        self.say(f"copied byte for byte: {', '.join(copied) or 'nothing'}")
        for name, reason in plan.checkpoint.left_behind:
            self.say(f"left behind: {name} ({reason})")

    def show_estimate(self, estimate: Estimate) -> None:
        """How long the run will take, by the rough rule."""
        self.say(
            f"estimate: about {time_text(estimate.seconds)} by a rough rule ({_parts_text(estimate)}); "
            "quantize RECIPE --smoke measures it"
        )

    def show_disk(self, plan: Plan, outlook: Outlook) -> None:
        """What a run takes of its drives, and what is free there."""
        use = outlook.disk
        parts = [f"disk: {size_text(plan.output_nbytes)} for the result"]
        if use.written:
            parts.append(f"{size_text(use.written)} of it written by an earlier run")
        free = f"{size_text(use.drive.free)} free at {use.drive.directory}"
        hidden = f"{size_text(use.scratch)} for hidden states meanwhile"
        if use.scratch and use.scratch_drive is not None:
            there = use.scratch_drive
            parts += [f"{free}; {hidden}", f"{size_text(there.free)} free at {there.directory}"]
        else:
            parts += [hidden, free] if use.scratch else [free]
        self.say(", ".join(parts))

    def show_outlook(self, outlook: Outlook) -> None:
        """What a run would make of what is at its output."""
        for note in outlook.notes:
            self.say(f"note: {note}")

    # --- during ---

    @contextmanager
    def progress(self, plan: Plan, journal: Journal) -> Iterator[Callable[[str, int], None]]:
        """Yields what to call after each piece and layer, with a label and the bytes read."""
        total = plan.read_nbytes
        done = sum(piece.nbytes for piece in plan.pieces if piece.unit in journal.done)
        done += sum(layer.nbytes for layer in plan.layers if layer.unit in journal.done)
        if self.rich.is_terminal:
            yield from self._bar(total, done)
        else:
            yield self._lines(total, done)

    def _bar(self, total: int, done: int) -> Iterator[Callable[[str, int], None]]:
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=self.rich) as progress:
            task = progress.add_task("reading", total=total, completed=done)
            yield lambda label, nbytes: progress.update(task, advance=nbytes, description=label)

    def _lines(self, total: int, done: int) -> Callable[[str, int], None]:
        begun, first, last = time.monotonic(), done, time.monotonic()

        def on_progress(label: str, nbytes: int) -> None:
            nonlocal done, last
            done += nbytes
            now = time.monotonic()
            if now - last < PLAIN_INTERVAL:
                return
            last = now
            rate = max(done - first, 1) / (now - begun)
            left = (total - done) / rate
            self.say(
                f"{label}: {size_text(done)} of {size_text(total)} ({100 * done / total:.0f}%), "
                f"{size_text(rate)}/s, {left:.0f} s left"
            )

        return on_progress

    # --- after ---

    def show_outcome(self, outcome: Outcome, slowest: int = 0) -> None:
        """What was checked and noticed; then verdict, place, sizes, time, and the command that serves it.

        Args:
            outcome: of the run.
            slowest: layers whose timings are shown; their record is in quantize/events.jsonl in any case.
        """
        if outcome.already:
            self.say(f"{outcome.output}: done already, by an identical run; --fresh would do it again")
            if outcome.report is not None:  # it was validated further than it had been
                self.show_report(outcome.report)
            self._show_serve(outcome)
            return
        if slowest:
            self.show_layers(outcome.layers, slowest)
        totals = outcome.totals
        if totals.seconds:
            self.say(
                f"read {size_text(totals.bytes_read)}, wrote {size_text(totals.bytes_written)} in "
                f"{totals.seconds:.2f} s ({size_text(totals.bytes_read / totals.seconds)}/s read)"
            )
        self.show_calibrated(totals, outcome.findings)
        if outcome.report is not None:
            self.show_report(outcome.report)
        self.say(f"published: {outcome.output}")
        before, after = outcome.sizes
        if before:
            self.say(f"size: {size_text(before)} became {size_text(after)}, {after / before:.0%} of the source")
            self.say(f"time: {time_text(outcome.seconds)}")
        self._show_serve(outcome)

    def _show_serve(self, outcome: Outcome) -> None:
        if outcome.serve:
            self.say(f"serve it: {shlex.join(outcome.serve)}", whole=True)

    def show_smoke(self, smoke: Smoke) -> None:
        """What a smoke test says: the checks, and what the whole run will take."""
        self.show_report(smoke.report)
        if (estimate := smoke.estimate) is not None:
            self.say(
                f"estimate of the whole run, verification aside: about {time_text(estimate.seconds)} "
                f"({_parts_text(estimate)}); "
                f"memory {size_text(estimate.memory[0])} here, at most {size_text(estimate.memory[1])}; disk "
                f"{size_text(estimate.disk[0])}"
                + (f" and {size_text(estimate.disk[1])} of hidden states meanwhile" if estimate.disk[1] else "")
                + (f"; {size_text(estimate.device)} of the GPU" if estimate.device else "")
                + f"; the source's drive reads {size_text(estimate.reading)}/s"
            )
        for line in smoke.refusals:
            self.say(f"the whole run would be refused now: {line}")
        if smoke.kept is not None:
            self.say(f"kept: {smoke.kept}")
        elif not smoke.report.passed:
            self.say("the first layers and their result are removed; --keep leaves them to look at")
        verdict = "passed" if smoke.report.passed else "FAILED"
        after = f": {smoke.layers[0]} of {smoke.layers[1]} layers in {smoke.seconds:.0f} s"
        self.say_verdict("smoke test ", verdict, smoke.report.passed, after)

    def show_layers(self, layers: list[dict[str, Any]], slowest: int) -> None:
        """Seconds a stage, summed over pieces; stages of different pieces overlap."""
        if not layers:
            return

        def seconds(stage: str) -> Callable[[Any], str]:
            return lambda row: f"{row[f'{stage}_s']:.3f}"

        def optional(key: str, show: Callable[[Any], str]) -> Callable[[Any], str]:
            return lambda row: show(row[key]) if key in row else ""

        stages = [stage for stage in STAGES if any(row[f"{stage}_s"] for row in layers)]
        sizes = (("read", "bytes_read", 3), ("written", "bytes_written", 4), ("RSS", "rss_bytes", 5))
        more = (("tokens/s", "tokens_per_s", str, 6), ("GPU", "device_bytes", size_text, 2))
        columns = [
            Column("part", lambda row: row["layer"], right=False),
            *(Column(f"{stage} s", seconds(stage), rank=1) for stage in stages),
            *(Column(name, optional(key, size_text), rank) for name, key, rank in sizes),
            *(Column(name, optional(key, show), rank) for name, key, show, rank in more if layers[0].get(key)),
        ]
        title = f"slowest {min(slowest, len(layers))} of {len(layers)} parts (stages overlap)"
        self.rich.print(fitted(layers[:slowest], columns, self.rich.width, title=title))

    def show_calibrated(self, seen: Totals, findings: tuple[str, ...]) -> None:
        """Reads and forwards, counted; and what the observed amax says."""
        if seen.reads:
            most = max(seen.reads.values())
            times = "once" if most == 1 else f"at most {most} times"
            replay = f", {seen.replayed} of them run again after a resume" if seen.replayed else ""
            self.say(
                f"{seen.layers} layers{replay}: {len(seen.reads)} weights read {times}, {seen.forwards} layer "
                f"forwards; imports took {seen.imports:.1f} s"
            )
        for line in seen.notes:
            self.say(f"note: {line}")
        for line in findings[:MOST_FINDINGS]:
            self.say(f"note: {line}")
        if len(findings) > MOST_FINDINGS:
            self.say(f"note: {len(findings) - MOST_FINDINGS} more in quantize/calibration.json")

    def show_report(self, report: Report) -> None:
        """Verification, check by check, problem by problem."""
        for line in report.checked:
            self.say(f"checked: {line}")
        for line in report.notes:
            self.say(f"note: {line}")
        for line in report.problems:
            self.say_verdict("", "PROBLEM", False, f": {line}")
        verdict = "passed" if report.passed else f"FAILED, {len(report.problems)} problem(s)"
        how = "loaded" if report.level == "load" else "loaded and run"
        proof = f"{how} in {report.vllm['server']}" if report.proven_in_vllm else "structure; not validated in vLLM"
        said = [text for text in (report.not_quantized, proof if report.passed else None) if text]
        self.say_verdict("verification: ", verdict, report.passed, f" ({'; '.join(said)})" if said else "")


def _parts_text(estimate: Estimate) -> str:
    """The parts of an estimate in the order of the run, without those that round to nothing."""
    told = {part: seconds for part, seconds in estimate.parts.items() if seconds >= 0.5} or estimate.parts
    return ", ".join(f"{PARTS.get(part, part)} {time_text(seconds)}" for part, seconds in told.items())
