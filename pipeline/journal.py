"""Finished units and who may go on: OUTPUT.partial/quantize/journal.jsonl, and the lock beside it.

The first line is the run's identity; each further line is a unit whose bytes are on the device, with the
hashes of its pieces. A line is written and flushed after the bytes it speaks of, so a kill at any moment
leaves either the line and the bytes, or neither counts. A torn last line is cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.result import JOURNAL, LOCK
from pipeline.checkpoint.writer import sync_directory
from pipeline.errors import Busy, OtherRun, UsageError


@dataclass(frozen=True)
class Digest:
    """The SHA-256 of a run of bytes of one output tensor."""

    tensor: str
    offset: int  # in the output shard's file
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Saved:
    """Hidden states after a decoder layer, in a file that a run can go on from."""

    layer: int
    file: str
    nbytes: int
    sha256: str


@dataclass
class State:
    """What a journal says after its first line.

    Attributes:
        done: the hashes of finished units.
        facts: what was measured while a unit was made, for the report.
        saved: the last hidden states.
        replaces: the fingerprint of the result that the run was told to replace; None: it replaces none.
    """

    done: dict[int, list[Digest]] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    saved: Saved | None = None
    replaces: str | None = None


class Journal:
    """The journal of one OUTPUT.partial, locked for as long as it is open.

    Attributes:
        discarded: whether opening it threw away what an earlier run had left.
    """

    def __init__(self, partial: Path, file: int, lock: int, state: State) -> None:
        self.partial = partial
        self.done, self.facts, self.saved = state.done, state.facts, state.saved
        self.discarded = False
        self._file = file
        self._lock = lock

    @classmethod
    def open(
        cls,
        partial: Path,
        identity: dict[str, Any],
        fresh: bool = False,
        restart: bool = False,
        replaces: str | None = None,
    ) -> Journal:
        """Lock `partial`, making it if need be, and read what is finished.

        Args:
            partial: the directory under construction.
            identity: this run's; a journal of another identity is refused.
            fresh: throw away what a run of another identity left there; what this one finished stays.
            restart: throw away whatever an earlier run left there.
            replaces: the fingerprint of the result that this run is told to replace, for `begun_to_replace`.

        Raises:
            Busy: another process holds the lock.
            OtherRun: its journal belongs to another run; the text names the fields that differ.
            UsageError: the directory is not this tool's.
        """
        _refuse_strangers(partial)
        (partial / "quantize").mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
        try:
            path = partial / JOURNAL
            discards = path.exists() and (restart or (fresh and not _goes_on(path, identity, partial)))
            if discards or (fresh and not path.exists()):
                _empty(partial)
            state = _read(path, identity, partial)
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if os.fstat(file).st_size == 0:
                _append(file, {"identity": identity})
            if replaces not in (None, state.replaces):
                _append(file, {"replaces": replaces})
            for directory in (partial / "quantize", partial, partial.parent):
                sync_directory(directory)
        except BaseException:
            os.close(lock)
            raise
        journal = cls(partial, file, lock, state)
        journal.discarded = discards
        return journal

    def finish(self, unit: int, digests: list[Digest], facts: dict[str, Any] | None = None) -> None:
        """Record a unit whose bytes are flushed, with what was measured while it was made."""
        rows = [[digest.tensor, digest.offset, digest.nbytes, digest.sha256] for digest in digests]
        _append(self._file, {"unit": unit, "pieces": rows, **({"facts": facts} if facts else {})})
        self.done[unit] = digests
        if facts:
            self.facts[unit] = facts

    def save(self, saved: Saved) -> None:
        """Record hidden states whose file is on the device; they replace those before."""
        _append(self._file, {"hidden": [saved.layer, saved.file, saved.nbytes, saved.sha256]})
        self.saved = saved

    def forget(self, units: Iterable[int]) -> None:
        """Take finished units back: what they wrote is gone."""
        units = sorted(units)
        if units:
            _append(self._file, {"forget": units})
            for unit in units:
                self.done.pop(unit, None)
                self.facts.pop(unit, None)

    def close(self) -> None:
        """Close the journal and give up the lock."""
        os.close(self._file)
        os.close(self._lock)


def read_identity(directory: Path) -> dict[str, Any] | None:
    """The identity of the run that made, or is making, this directory; None if no run of this tool did."""
    try:
        with (directory / JOURNAL).open(encoding="utf-8") as file:
            entry = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    found = entry.get("identity") if isinstance(entry, dict) else None
    return dict(found) if isinstance(found, dict) else None


def fingerprint(identity: Mapping[str, Any]) -> str:
    """The SHA-256 of an identity, by which a journal names the result that its run replaces."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def begun_to_replace(partial: Path, identity: dict[str, Any], output: Path) -> bool:
    """Whether a run of this identity was begun in `partial` to replace the very result that is in `output`.

    The same command, or the command without ``--fresh``, then goes on and replaces it.
    """
    found = read_identity(output)
    if found is None or read_identity(partial) != identity:
        return False
    try:
        raw = (partial / JOURNAL).read_bytes()
        state = _parse(raw[: raw.rfind(b"\n") + 1].splitlines()[1:])  # without the line that a kill tore
    except (OSError, ValueError):
        return False
    return state.replaces == fingerprint(found)


def finished_units(partial: Path, identity: dict[str, Any]) -> int | None:
    """How many units a run of this identity has finished in `partial`; nothing there is changed.

    Returns:
        None where no run was begun.

    Raises:
        OtherRun: another run was begun there.
        UsageError: the directory is not this tool's.
    """
    _refuse_strangers(partial)
    path = partial / JOURNAL
    return len(_read(path, identity, partial, mend=False).done) if path.exists() else None


def read_pieces(directory: Path) -> list[Digest] | None:
    """The hashes that the run recorded, without units taken back; None without a journal.

    Raises:
        ValueError: the journal is damaged.
    """
    try:
        lines = (directory / JOURNAL).read_bytes().splitlines()
    except FileNotFoundError:
        return None
    return [digest for digests in _parse(lines[1:]).done.values() for digest in digests]


def _parse(lines: list[bytes]) -> State:
    state = State()
    try:
        for line in lines:
            entry = json.loads(line)
            if "forget" in entry:
                for unit in entry["forget"]:
                    state.done.pop(unit, None)
                    state.facts.pop(unit, None)
            elif "hidden" in entry:
                state.saved = Saved(*entry["hidden"])
            elif "replaces" in entry:
                state.replaces = entry["replaces"]
            else:
                state.done[entry["unit"]] = [Digest(*row) for row in entry["pieces"]]
                if "facts" in entry:
                    state.facts[entry["unit"]] = entry["facts"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("the journal is damaged") from None
    return state


def _append(file: int, entry: dict[str, Any]) -> None:
    line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
    while line:
        line = line[os.write(file, line) :]
    os.fsync(file)


def _lock(partial: Path) -> int:
    """An exclusive lock on the directory; the kernel drops it with the process, however that ends."""
    path = partial / LOCK
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.fstat(lock).st_ino == os.stat(path).st_ino  # else the other run published and moved it meanwhile
    except (BlockingIOError, FileNotFoundError):
        same = False
    if not same:
        os.close(lock)
        raise Busy(f"{partial}: another run is writing here", remedy="wait for it, or choose another output")
    return lock


def discard(directory: Path) -> None:
    """Remove a directory of this tool; its journal first, so that no part of it is ever taken for finished work."""
    (directory / JOURNAL).unlink(missing_ok=True)
    sync_directory(directory / "quantize")
    shutil.rmtree(directory)


def _goes_on(path: Path, identity: dict[str, Any], partial: Path) -> bool:
    """Whether a run of this identity can go on from this journal."""
    try:
        _read(path, identity, partial)
    except (OtherRun, UsageError):
        return False
    return True


def _empty(partial: Path) -> None:
    """Remove everything but the lock; the journal first, as in `discard`."""
    (partial / JOURNAL).unlink(missing_ok=True)
    sync_directory(partial / "quantize")
    for path in [*partial.iterdir(), *(partial / "quantize").iterdir()]:
        if path in (partial / "quantize", partial / LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_strangers(partial: Path) -> None:
    """Before anything is touched: a directory of this name that no run of this tool made."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise UsageError(f"{partial}: it is a link or a file, not a directory of this tool", remedy="move it away")
    if not partial.exists() or (partial / LOCK).exists() or (partial / JOURNAL).exists():
        return
    strange = sorted(path.name for path in partial.iterdir() if path.name != "quantize" or any(path.iterdir()))
    if strange:
        raise UsageError(
            f"{partial}: it holds {strange[0]}, but no journal of this tool",
            remedy="move it away, or choose another output",
        )


def _read(path: Path, identity: dict[str, Any], partial: Path, mend: bool = True) -> State:
    """The journal; with `mend` a line that a kill tore is cut off."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return State()
    whole = raw[: raw.rfind(b"\n") + 1]
    if mend and len(whole) != len(raw):
        os.truncate(path, len(whole))
    lines = whole.splitlines()
    if not lines:
        return State()
    try:
        found = json.loads(lines[0])["identity"]
        state = _parse(lines[1:])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: the journal is damaged", remedy="start over with --fresh") from None
    if found != identity:
        changed = "\n".join(f"  {line}" for line in differences(found, identity))
        raise OtherRun(
            f"{partial}: another run began this; it differs in\n{changed}",
            differing(found, identity),
            begun=True,
            remedy="run that recipe again to go on with it, choose another output, or start over with --fresh",
        )
    return state


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields in which two identities differ, with both values, for a person to read."""
    lines = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key.startswith("source.") and isinstance(old, list) and isinstance(new, list):
            lines.append(f"{key}: the file has changed")
        elif key == "layout":
            continue  # follows from another field
        else:
            lines.append(f"{key}: {_short(old)} then, {_short(new)} now")
    return lines or ["layout: the output's layout"]


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> frozenset[str]:
    """The names of the fields in which two identities differ."""
    return frozenset(key for key in set(before) | set(now) if before.get(key) != now.get(key))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
