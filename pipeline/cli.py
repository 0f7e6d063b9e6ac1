"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, cast

import click

from pipeline import __version__, library_messages
from pipeline.errors import OtherRun, PipelineError, UsageError, from_os_error

DEFAULT_COMMAND = "run"
KEPT = "interrupted; what is finished is kept, run the same command again to go on"
NOTHING_KEPT = "interrupted; nothing was changed and nothing is left behind"


class RecipeFirst(click.Group):
    """`quantize recipe.yaml` means `quantize run recipe.yaml`; every other word is a command's name."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        """Put the default command before what looks like a recipe or an option of it."""
        if args and args[0] not in self.commands:
            looks_like_recipe = args[0].endswith((".yaml", ".yml")) or Path(args[0]).exists() or "/" in args[0]
            if looks_like_recipe or args[0].startswith("-"):
                return super().resolve_command(context, [DEFAULT_COMMAND, *args])
        return super().resolve_command(context, args)


@click.group(
    cls=RecipeFirst,
    context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True},
    epilog="Exit status: 0 done; 1 failed, nothing published; 2 the recipe or the command line is wrong; "
    "75 interrupted after a clean save, run again to go on.",
)
@click.version_option(__version__, prog_name="quantize")
def main() -> None:
    """Convert a BF16 checkpoint into an FP8 one that vLLM serves.

    \b
    quantize RECIPE [KEY=VALUE ...]        convert, verify, publish; with --smoke a test of it in a minute
    quantize plan RECIPE [KEY=VALUE ...]   what would happen, without reading a tensor
    quantize verify CHECKPOINT             is it whole, and what will vLLM make of it
    quantize batch RECIPE|DIR|MANIFEST ... many conversions unattended, and a report at the end
    quantize doctor [RECIPE]               is this machine fit for it

    KEY is a dotted key of the recipe, for instance output=/nvme/out or model.source=/models/x.
    """


FORMAT = 1  # of what --json prints; keys are added, none changes its meaning
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE ...]")


@main.command(name=DEFAULT_COMMAND)
@RECIPE
@OVERRIDES
@click.option(
    "--fresh", is_flag=True, help="Replace an earlier result. A stopped run of this recipe goes on, others are removed."
)
@click.option("--restart", is_flag=True, help="Throw away what a stopped run finished, and begin with its first unit.")
@click.option(
    "--smoke", is_flag=True, help="The first layers and a few captions only, elsewhere; then an estimate of the run."
)
@click.option("--keep", is_flag=True, help="With --smoke: leave the truncated source and result to look at.")
@click.option("--verbose", is_flag=True, help="At the end, the slowest layers as well.")
def run_command(
    recipe: Path, overrides: tuple[str, ...], fresh: bool, restart: bool, smoke: bool, keep: bool, verbose: bool
) -> None:
    """Convert a checkpoint as RECIPE says (the word `run` may be left out)."""
    from pipeline.recipe import recipe as recipes
    from pipeline.report.console import Console
    from pipeline.run import runner

    console = Console()
    if smoke and (fresh or restart):
        option = "--fresh" if fresh else "--restart"
        _fail(UsageError(f"{option}: it belongs to a whole run; --smoke never touches the output"))
    if smoke:
        from pipeline.run import smoke as smokes

        done = _guarded(lambda: smokes.smoke(recipes.load(recipe, overrides), console, keep), NOTHING_KEPT)
        console.show_smoke(done)
        if not done.report.passed:
            sys.exit(1)
        if done.refusals:
            sys.exit(done.refusals[0].exit_status)
        return
    if keep:
        _fail(UsageError("--keep: it belongs to --smoke"))
    outcome = _guarded(lambda: runner.run(recipes.load(recipe, overrides), console, fresh, restart=restart))
    console.show_outcome(outcome, slowest=5 if verbose else 0)


@main.command()
@RECIPE
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON: every tensor, every place.")
def plan(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show every tensor's action, the output's shards, memory, disk and time, from headers alone.

    Also where the output exists: a note says what the run would make of it.
    """
    from pipeline.checkpoint import hub
    from pipeline.plan import plan as plans
    from pipeline.recipe import recipe as recipes
    from pipeline.report.console import Console
    from pipeline.report.plan import as_json as plan_as_json
    from pipeline.run.estimate import estimate_by_rule
    from pipeline.run.outlook import outlook
    from pipeline.run.runner import say_imports
    from pipeline.verify.verify import find_environment, how_verified

    console = Console(quiet=as_json)

    def make() -> tuple[plans.Plan, Any, Any, Any]:
        wanted = recipes.load(recipe, overrides)
        source = hub.resolve(wanted.model.source, wanted.model.revision, headers_only=True)
        say_imports(wanted, console)
        made = plans.make_plan(wanted, source)
        found = outlook(made)
        environment = find_environment(wanted)
        estimate = estimate_by_rule(made, "structure" if environment is None else wanted.verify)
        return made, environment, estimate, found

    made, environment, estimate, found = _guarded(make, as_json=as_json)
    if as_json:
        error = {} if found.refusal is None else {"error": _error_fields(found.refusal)}
        click.echo(json.dumps({"format": FORMAT, **plan_as_json(made, estimate, found), **error}))
        if found.refusal is not None:
            _fail(found.refusal)
        return
    console.show_plan_table(made)
    console.say(how_verified(made.recipe, environment))
    console.show_disk(made, found)
    console.show_estimate(estimate)
    console.show_outlook(found)
    if found.refusal is not None:
        _fail(found.refusal)


@main.command()
@click.argument("checkpoint")
@click.option("--source", help="What it was made from: a directory or a hub id.")
@click.option("--revision", help="Of the source, where that is a hub id.")
@click.option(
    "--level",
    type=click.Choice(["structure", "load", "generate"]),
    default="load",
    show_default=True,
    help="How far: the files alone; vLLM's own loader; vLLM's engine against the source's answers.",
)
@click.option("--vllm-python", help="The Python of vLLM's environment, if not in the usual place.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def verify(
    checkpoint: str, source: str | None, revision: str | None, level: str, vllm_python: str | None, as_json: bool
) -> None:
    """Check a quantized checkpoint, whoever made it: a directory, or a hub id (org/name, or org/name@revision).

    Structure and recorded hashes; with --source every tensor's account and bytes; then vLLM's own loader, and its
    engine where asked for. Exit status 1 says that something is wrong with it, 2 that there is none of this name.
    """
    from pipeline.report.console import Console
    from pipeline.verify import verify
    from pipeline.verify.named import checkpoint_named, source_named
    from pipeline.vllm_env.environment import find
    from pipeline.vllm_env.worker import VllmWorker

    console = Console()

    def check() -> Any:
        directory, name = checkpoint_named(checkpoint)
        original = source_named(source, revision) if source else None
        found = None if level == "structure" else find(vllm_python, "--vllm-python")
        say = (lambda text: None) if as_json else console.say
        with VllmWorker(found) if found is not None else nullcontext() as worker:
            report = verify.verify(directory, original, cast(verify.Level, level), worker, contents=True, say=say)
        report.checkpoint = name
        return report

    report = _guarded(check, NOTHING_KEPT, as_json)
    if as_json:
        click.echo(json.dumps({"format": FORMAT, **report.as_json()}, indent=2))
    else:
        console.show_report(report)
    if not report.passed:
        sys.exit(1)


@main.command()
@click.argument("what", nargs=-1, metavar="RECIPE|DIR|MANIFEST ... [KEY=VALUE ...]")
@click.option("--until", metavar="HH:MM", help="Start nothing that would not end by then, and stop the rest cleanly.")
@click.option("--budget", metavar="9h", help="The same, as a length of time from now.")
@click.option("--jobs", type=click.IntRange(1), help="Jobs at once that need no GPU, or find none.  [default: 1]")
@click.option("--jobs-per-gpu", type=click.IntRange(1), default=1, show_default=True, help="Jobs at once on each GPU.")
@click.option("--disk-wait", default="2h", show_default=True, help="How long a job waits for space on its drive.")
@click.option("--ray", metavar="ADDRESS|auto", help="Run the jobs on this Ray cluster (needs the extra `ray`).")
@click.option("--directory", type=click.Path(path_type=Path), help="For logs and report.  [default: batch/NAME]")
@click.option("--on-finish", metavar="CMD", help="A shell command at the end; see docs/batch.md for its variables.")
@click.option("--on-failure", metavar="CMD", help="A shell command for each job that fails for good.")
@click.option("--fresh", is_flag=True, help="Replace results of other recipes; those of the same recipe stay.")
@click.option("--dry-run", is_flag=True, help="Plan every job, show the table, start nothing.")
@click.option("--status", is_flag=True, help="Show a batch that runs, or ran: the latest, or the one of DIR.")
@click.option("--json", "as_json", is_flag=True, help="At the end the report as JSON, and nothing else.")
def batch(what: tuple[str, ...], status: bool, as_json: bool, **options: Any) -> None:
    """Convert many checkpoints, unattended: each in its own process, resumed, retried or refused as it deserves.

    The same command again goes on where a batch stopped. Exit status 0: all are published; 1: some failed; 75: the
    window is over, or it was stopped, and jobs are left.
    """
    from pipeline.batch import command
    from pipeline.report.console import Console

    console = Console(quiet=as_json)
    if status:
        named = options["directory"] or (Path(what[0]) if what else None)
        directory = _guarded(lambda: command.status(named, console), NOTHING_KEPT, as_json)
        done = 0
    else:
        done, directory = _guarded(lambda: command.run(what, command.Options(**options), console), as_json=as_json)
    if as_json and directory is not None:
        click.echo((directory / "report.json").read_text(encoding="utf-8"), nl=False)
    if done:
        sys.exit(done)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
def doctor(recipe: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Is this machine fit for the run? GPU, memory, threads, drives, libraries, vLLM; each finding with its remedy.

    Nothing is changed; a scratch file of 256 MB measures the output's drive and is removed. Exit status 1 says that
    the run would not work here.
    """
    from pipeline import doctor as doctors
    from pipeline.recipe import recipe as recipes

    def look() -> list[doctors.Finding]:
        return doctors.examine(recipes.load(recipe, overrides) if recipe is not None else None)

    findings = _guarded(look, NOTHING_KEPT, as_json)
    if as_json:
        click.echo(json.dumps({"format": FORMAT, **doctors.as_json(findings)}, indent=2))
    else:
        from pipeline.report.console import Console

        doctors.show(findings, Console())
    sys.exit(doctors.exit_status(findings))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="trace.json", show_default=True,
    help="The file; - is standard output.",
)  # fmt: skip
def trace(checkpoint: Path, output: Path) -> None:
    """Write a run's timings as a trace that opens in Perfetto (ui.perfetto.dev). CHECKPOINT may be a .partial."""
    from pipeline.checkpoint.result import EVENTS
    from pipeline.events import chrome_trace, read_events

    events = checkpoint / EVENTS
    if not events.exists():
        _fail(UsageError(f"{events}: no such file; a run of this program leaves it in its output"))
    made = _guarded(lambda: chrome_trace(read_events(events)))
    if str(output) == "-":
        click.echo(json.dumps(made))
        return
    _guarded(lambda: output.write_text(json.dumps(made), encoding="utf-8"))
    click.echo(f"{output}: {len(made['traceEvents'])} events; open it at ui.perfetto.dev")


@main.command()
@click.argument("name", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the copy goes.  [default: NAME.yaml]")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def recipes(name: str | None, output: Path | None, force: bool) -> None:
    """List the recipes that come with this program, or copy the one called NAME to start from."""
    from pipeline.recipe import shipped

    if name is None:
        known = shipped.shipped()
        width = max(map(len, known))
        for recipe in known.values():
            click.echo(f"{recipe.name:<{width}}  {recipe.summary}")
        click.echo("copy one with: quantize recipes NAME -o my.yaml")
        return
    found = _guarded(lambda: shipped.find(name), NOTHING_KEPT)
    target = output if output is not None else Path(f"{found.name}.yaml")
    if target.is_dir():
        target = target / f"{found.name}.yaml"
    if target.exists() and not force:
        _fail(UsageError(f"{target}: it exists already", remedy="choose another file, or replace it with --force"))
    _guarded(lambda: target.write_text(found.text(str(target)), encoding="utf-8"), NOTHING_KEPT)
    click.echo(f"{target}: {found.summary}")


@main.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from pipeline.recipe.recipe import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def _guarded(call: Any, interrupted: str = KEPT, as_json: bool = False) -> Any:
    """Run a command's work; what the user can fix becomes text and an exit status, never a traceback.

    With `as_json` an error is an object on standard output, too, for whoever reads that.

    What other libraries say goes to the run's record, not to the terminal.
    SIGTERM and SIGHUP end it as Ctrl-C does, so that whatever cleans up behind itself can.
    """
    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, _interrupt) for number in heard}
    try:
        with library_messages.collected():
            return call()
    except PipelineError as error:
        _fail(error, as_json)
    except KeyboardInterrupt:
        click.echo(interrupted, err=True)
        sys.exit(75)
    except OSError as error:
        _fail(from_os_error(error, "this command"), as_json)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _error_fields(error: PipelineError) -> dict[str, Any]:
    text = "\n".join((error.message, *error.lines))
    fields: dict[str, Any] = {"kind": error.kind, "message": text, "remedy": error.remedy}
    fields["exit_status"] = error.exit_status
    if isinstance(error, OtherRun):
        fields["differences"] = error.differences
    return fields


def _fail(error: PipelineError, as_json: bool = False) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"format": FORMAT, "error": _error_fields(error)}))
    for line in str(error).splitlines():
        click.echo(line if error.exit_status == 75 or line.startswith(" ") else f"error: {line}", err=True)
    sys.exit(error.exit_status)
