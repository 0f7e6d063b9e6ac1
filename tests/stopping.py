"""Runs in this process, and runs that a real signal stops after so many units."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted
from pipeline.journal import Journal
from pipeline.recipe.recipe import load
from pipeline.report.console import Console
from pipeline.report.outcome import Outcome
from pipeline.run import runner


def run(recipe: Path, *overrides: str, **options: bool) -> Outcome:
    return runner.run(load(recipe, overrides), Console(), **options)


def stopped(recipe: Path, *overrides: str, after: int = 2, **options: bool) -> int:
    """The units that a run has finished when a real signal stops it."""
    finish, seen = Journal.finish, []

    def counted(self: Journal, unit: int, *arguments: Any) -> None:
        finish(self, unit, *arguments)
        seen.append(unit)
        if len(seen) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", counted)
        with pytest.raises(Interrupted, match="run the same command again to go on"):
            run(recipe, *overrides, **options)
    return len(seen)
