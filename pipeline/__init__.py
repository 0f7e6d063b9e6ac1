"""Offline FP8 quantization of Hugging Face checkpoints: streamed, resumable, validated in vLLM.

The same from Python as from the command line::

    from pipeline import convert

    outcome = convert("recipe.yaml", ["output=/nvme/out"])
    print(outcome.output, outcome.report.passed)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.report.outcome import Outcome

__all__ = ["__version__", "convert"]

try:
    __version__ = version("fp8-pipeline")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"


def convert(
    recipe: Path | str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    restart: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Convert a checkpoint as ``quantize RECIPE [KEY=VALUE ...]`` does: plan, stream, finalize, verify, publish.

    Run again after an interruption, it goes on where the last call stopped.

    Args:
        recipe: a recipe's YAML file, or its keys as a mapping, e.g. ``{"model": {"source": ...}, "output": ...}``.
        overrides: ``KEY=VALUE`` with dotted keys, which win over the recipe.
        fresh: replace an earlier result of this program; a stopped run of this recipe goes on, one of another recipe
            is thrown away.
        restart: throw away what a stopped run finished, whatever recipe it had.
        quiet: print nothing.

    Returns:
        Where the result is, per-layer timings, bytes read and written, and the report of its verification.

    Raises:
        pipeline.errors.PipelineError: nothing is published then. `UsageError` for what is wrong with the recipe,
            `VerificationFailed` for a result that did not pass, `Interrupted` after a clean save.
    """
    import yaml

    from pipeline.recipe import recipe as recipes
    from pipeline.report.console import Console
    from pipeline.run import runner

    if isinstance(recipe, Mapping):
        wanted = recipes.parse(yaml.safe_dump(dict(recipe), allow_unicode=True), "recipe", overrides)
    else:
        wanted = recipes.load(recipe, overrides)
    return runner.run(wanted, Console(quiet), fresh, restart=restart)
