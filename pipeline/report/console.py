"""What the user sees: a progress display on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.events import STAGES
from pipeline.plan.plan import Plan
from pipeline.report.plan import summary
from pipeline.units import size_text, time_text

if TYPE_CHECKING:
    import rich.console

    from pipeline.journal import Journal
    from pipeline.report.outcome import Estimate, Outcome, Smoke
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

        self.rich: rich.console.Console = rich.console.Console(highlight=False, quiet=quiet)
        if not self.rich.is_terminal:
            self.rich.width = LOG_WIDTH

    def say(self, text: str) -> None:
        """One line, as it is."""
        self.rich.print(text, markup=False, soft_wrap=True)

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
        from rich.table import Table

        self.show_plan(plan)
        table = Table(title="every tensor's action", title_justify="left")
        for name in ("part", "action", "why", "tensors", "source", "output"):
            numeric = name in ("tensors", "source", "output")
            table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
        for row in summary(plan):
            table.add_row(
                row["component"], row["action"], row["reason"], str(row["tensors"]),
                size_text(row["source_bytes"]), size_text(row["output_bytes"]),
            )  # fmt: skip
        self.rich.print(table)
        shards = Table(title=f"output shards in {plan.recipe.output}", title_justify="left")
        shards.add_column("file")
        shards.add_column("tensors", justify="right")
        shards.add_column("size", justify="right")
        counted = [0] * len(plan.shards)
        for output in plan.outputs.values():
            counted[output.shard] += 1
        for shard, count in zip(plan.shards, counted, strict=True):
            shards.add_row(shard.name, str(count), size_text(shard.size))
        self.rich.print(shards)
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
            rate = (done - first) / (now - begun)
            left = (total - done) / rate
            self.say(
                f"{label}: {size_text(done)} of {size_text(total)} ({100 * done / total:.0f}%), "
                f"{size_text(rate)}/s, {left:.0f} s left"
            )

        return on_progress

    # --- after ---

    def show_outcome(self, outcome: Outcome, slowest: int = 5) -> None:
        """The slowest layers, the totals, the verdict and the place."""
        if outcome.already:
            self.say(f"{outcome.output}: done already, by an identical run; --fresh would do it again")
            if outcome.report is not None:  # it was validated further than it had been
                self.show_report(outcome.report)
            return
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
        self.say(f"smoke test {verdict}: {smoke.layers[0]} of {smoke.layers[1]} layers in {smoke.seconds:.0f} s")

    def show_layers(self, layers: list[dict[str, Any]], slowest: int) -> None:
        """Seconds a stage, summed over pieces; stages of different pieces overlap."""
        from rich.table import Table

        if not layers:
            return
        title = f"slowest {min(slowest, len(layers))} of {len(layers)} parts (stages overlap)"
        table = Table(title=title, title_justify="left")
        table.add_column("part", overflow="fold")
        stages = [stage for stage in STAGES if any(row[f"{stage}_s"] for row in layers)]
        more: list[tuple[str, str, Callable[[Any], str]]] = [
            ("tokens/s", "tokens_per_s", str),
            ("GPU", "device_bytes", size_text),
        ]
        more = [entry for entry in more if any(row.get(entry[1]) for row in layers)]
        for name in (*(f"{stage} s" for stage in stages), "read", "written", "RSS", *(entry[0] for entry in more)):
            table.add_column(name, justify="right", no_wrap=True)
        for row in layers[:slowest]:
            table.add_row(
                row["layer"],
                *(f"{row[f'{stage}_s']:.3f}" for stage in stages),
                *(size_text(row[key]) for key in ("bytes_read", "bytes_written", "rss_bytes")),
                *(show(row[key]) if key in row else "" for _, key, show in more),
            )
        self.rich.print(table)

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
            self.say(f"PROBLEM: {line}")
        verdict = "passed" if report.passed else f"FAILED, {len(report.problems)} problem(s)"
        how = "loaded" if report.level == "load" else "loaded and run"
        proof = f"{how} in {report.vllm['server']}" if report.proven_in_vllm else "structure; not validated in vLLM"
        self.say(f"verification: {verdict} ({proof})" if report.passed else f"verification: {verdict}")


def _parts_text(estimate: Estimate) -> str:
    """The parts of an estimate in the order of the run, without those that round to nothing."""
    told = {part: seconds for part, seconds in estimate.parts.items() if seconds >= 0.5} or estimate.parts
    return ", ".join(f"{PARTS.get(part, part)} {time_text(seconds)}" for part, seconds in told.items())
