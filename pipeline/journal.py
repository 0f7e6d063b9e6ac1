"""Finished units and who may go on: OUTPUT.partial/quantize/journal.jsonl, and the lock beside it.

The first line is the run's identity, and how it found its source; each further line is a unit whose bytes are
on the device, with the hashes of its pieces and of what was read for them. A line is written and flushed after
the bytes it speaks of, so a kill at any moment leaves either the line and the bytes, or neither counts. A torn
last line is cut off.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.result import JOURNAL, LOCK
from pipeline.checkpoint.writer import sync_directory, write_file
from pipeline.errors import Busy, OtherRun, UsageError
from pipeline.identity import MACHINE_FIELDS, Comparison, Difference, Recorded, compare, other_run, with_contents


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
        sources: by unit, the hashes of the ranges of the source that it was made from, in the plan's order; see
            `pipeline.stream.tensor_bytes.source_hash`. Earlier versions recorded none.
        saved: the last hidden states.
        replaces: the fingerprint of the result that the run was told to replace; None: it replaces none.
    """

    done: dict[int, list[Digest]] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    sources: dict[int, list[str]] = field(default_factory=dict)
    saved: Saved | None = None
    replaces: str | None = None


# compares the contents of these shards with what finished units read of them
Contents = Callable[[State, frozenset[str]], Sequence[Difference]]


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
        contents: Contents | None = None,
    ) -> Journal:
        """Lock `partial`, making it if need be, and read what is finished.

        Args:
            partial: the directory under construction.
            identity: this run's; a journal of another identity is refused.
            fresh: throw away what a run of another identity left there; what this one finished stays.
            restart: throw away whatever an earlier run left there.
            replaces: the fingerprint of the result that this run is told to replace, for `begun_to_replace`.
            contents: compares contents where the source may not be the one that was read; None: it is taken for it.

        Raises:
            Busy: another process holds the lock.
            OtherRun: its journal belongs to another run, or another source; the text says what differs.
            UsageError: the directory is not this tool's.
        """
        _refuse_strangers(partial)
        (partial / "quantize").mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
        try:
            path = partial / JOURNAL
            discards = path.exists() and restart
            state = None
            if path.exists() and not restart:
                try:
                    state = _read(path, identity, partial, contents=contents)
                except (OtherRun, UsageError):
                    if not fresh:
                        raise
                    discards = True
            if discards or (fresh and not path.exists()):
                _empty(partial)
            if state is None:
                state = State()
            else:
                _bring_up_to_date(path, identity)
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if os.fstat(file).st_size == 0:
                _append(file, _first_entry(identity))
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

    def finish(
        self, unit: int, digests: list[Digest], facts: dict[str, Any] | None = None, source: Sequence[str] = ()
    ) -> None:
        """Record a unit whose bytes are flushed, with what was measured while it was made, and what it was made from.

        Args:
            unit: its number.
            digests: of what was written.
            facts: for the report.
            source: hashes of what was read; see `State.sources`.
        """
        rows = [[digest.tensor, digest.offset, digest.nbytes, digest.sha256] for digest in digests]
        more: dict[str, Any] = {**({"source": list(source)} if source else {}), **({"facts": facts} if facts else {})}
        _append(self._file, {"unit": unit, "pieces": rows, **more})
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
    found = read_record(directory)
    return found.identity if found is not None else None


def read_record(directory: Path) -> Recorded | None:
    """The identity as in `read_identity`, with what the run saw of its source."""
    try:
        with (directory / JOURNAL).open(encoding="utf-8") as file:
            return _recorded(json.loads(file.readline()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _recorded(entry: Any) -> Recorded:
    """The first line of a journal; raises KeyError or TypeError for anything else."""
    identity, seen = entry["identity"], entry.get("seen") or {}
    if not isinstance(identity, dict) or not isinstance(seen, dict):
        raise TypeError("no first line of a journal")
    return Recorded(identity, seen)


def _first_entry(identity: Mapping[str, Any]) -> dict[str, Any]:
    seen = getattr(identity, "seen", None)
    return {"identity": identity, **({"seen": seen.stamps} if seen is not None and seen.stamps else {})}


def fingerprint(identity: Mapping[str, Any]) -> str:
    """The SHA-256 of an identity, by which a journal names the result that its run replaces."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def begun_to_replace(partial: Path, identity: dict[str, Any], output: Path) -> bool:
    """Whether a run of this identity was begun in `partial` to replace the very result that is in `output`.

    The same command, or the command without ``--fresh``, then goes on and replaces it.
    """
    found, begun = read_identity(output), read_record(partial)
    if found is None or begun is None or compare(begun, identity).fields:
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


def read_state(directory: Path) -> State:
    """What the journal of a published directory says after its first line.

    Raises:
        ValueError: the journal is damaged.
    """
    return _parse((directory / JOURNAL).read_bytes().splitlines()[1:])


def _parse(lines: list[bytes]) -> State:
    state = State()
    try:
        for line in lines:
            entry = json.loads(line)
            if "forget" in entry:
                for unit in entry["forget"]:
                    state.done.pop(unit, None)
                    state.facts.pop(unit, None)
                    state.sources.pop(unit, None)
            elif "hidden" in entry:
                state.saved = Saved(*entry["hidden"])
            elif "replaces" in entry:
                state.replaces = entry["replaces"]
            else:
                state.done[entry["unit"]] = [Digest(*row) for row in entry["pieces"]]
                if "facts" in entry:
                    state.facts[entry["unit"]] = entry["facts"]
                if "source" in entry:
                    state.sources[entry["unit"]] = entry["source"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("the journal is damaged") from None
    return state


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _append(file: int, entry: dict[str, Any]) -> None:
    line = _line(entry)
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


def _bring_up_to_date(path: Path, identity: Mapping[str, Any]) -> None:
    """Where the source is now, for the next run; and no path of this machine, which earlier versions recorded.

    The file is replaced in one step, so that a kill leaves the one or the other.
    """
    first, end, rest = path.read_bytes().partition(b"\n")
    entry = _first_entry(identity)
    if end and getattr(identity, "seen", None) is not None and json.loads(first) != entry:
        write_file(path, _line(entry) + rest)


def _read(
    path: Path, identity: dict[str, Any], partial: Path, contents: Contents | None = None, mend: bool = True
) -> State:
    """The journal of a run of this identity; with `mend` a line that a kill tore is cut off.

    Raises:
        OtherRun: it is another run's.
        UsageError: it is damaged.
    """
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
        found = compare(_recorded(json.loads(lines[0])), identity)
        state = _parse(lines[1:])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path}: the journal is damaged", remedy="start over with --fresh") from None
    if contents is not None:
        found = compare_contents(found, state, contents)
    if found.fields:
        raise other_run(partial, found, begun=True)
    return state


def compare_contents(found: Comparison, state: State, contents: Contents) -> Comparison:
    """The comparison with the contents of shards that may have changed, where nothing of recipe and source differs."""
    if not found.moved or not found.fields <= MACHINE_FIELDS:
        return found
    return with_contents(found, contents(state, found.moved))
