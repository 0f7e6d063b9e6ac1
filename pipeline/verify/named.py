"""What a verification is asked about: directories, or hub ids. A name that leads nowhere is no failed verification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.checkpoint import hub
from pipeline.checkpoint.source import Checkpoint, SourceError
from pipeline.errors import UsageError

T = TypeVar("T")


def checkpoint_named(text: str) -> tuple[Path, str]:
    """The directory of a checkpoint, and its name for the report.

    Args:
        text: a directory, or a hub id, with a revision as ``org/name@revision``. Of a hub id all that lies beside the
            weights is fetched as well, since the records of a run of this tool are part of what is verified.

    Raises:
        UsageError: it leads nowhere, or to a file.
        SourceError: the hub has no checkpoint under it.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return path, str(path)
    if path.exists():
        raise UsageError(f"{path}: it is a file", remedy=f"name the directory that it is in: {path.absolute().parent}")
    name, revision = hub.with_revision(text)
    asked = ("CHECKPOINT", "CHECKPOINT", f"{name}@main")
    found = _there(lambda: hub.resolve(name, revision, asked=asked, whole=True))
    return found.root, f"{name}@{found.revision}"


def source_named(text: str, revision: str | None) -> Checkpoint:
    """What a checkpoint was made from.

    Args:
        text: a directory, or a hub id, also as ``org/name@revision``.
        revision: of a hub id.

    Raises:
        UsageError: it leads nowhere.
        SourceError: what is there is no usable checkpoint.
    """
    name, of_name = hub.with_revision(text)
    if revision is not None and of_name not in (None, revision):
        raise UsageError(f"--revision {revision}: --source names another one, {of_name}", remedy="name one of them")
    asked = ("--source", "--revision", "--revision main")
    return _there(lambda: hub.resolve(name, revision or of_name, asked=asked))


def _there(resolve: Callable[[], T]) -> T:
    """A name that leads nowhere is the command line's mistake."""
    try:
        return resolve()
    except SourceError as error:
        if not error.leads_nowhere:
            raise
        raise UsageError(error.message, remedy=error.remedy) from None
