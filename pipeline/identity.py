"""What makes two runs the same: a run's identity, how two are compared, and how a difference is said.

A run may go on where another stopped, and a result is this very result, if the identities are the same. An identity
says what is in the source and nothing of where that lies: a copy is the same source. Whether a source is still the one
that was read is answered in three steps, from cheap to dear:

1. Sizes, headers, a few sampled blocks of each shard, and hashes of all small files are part of the identity.
2. A shard whose path, or inode, and times are those that were seen (`Seen.stamps`) is not read again.
3. Of any other shard, what finished units read of it is read again and compared with the hashes in the journal
   (`pipeline.run.moved`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import OtherRun
from pipeline.units import size_text

SOURCE = "source."  # fields of the source's files: a shard's are [bytes, SHA-256 of its header, sampled blocks]
# fields that two identities may differ in: they explain differences in others
EXPLAIN = frozenset({"recipe", "source", "source.revision"})
FOLLOW = frozenset({"layout", "units"})  # from other fields, or from this program
MACHINE_FIELDS = frozenset({"device", "threads"})  # they differ between the nodes of a cluster
FILES_SAID = 4

Stamps = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Seen:
    """How a run finds its source: what a copy does not share with it, and no part of the identity.

    Attributes:
        place: the source's directory, or its hub id.
        revision: the hub's commit; None for a directory.
        modified: mtime of each shard in ns, 0 where a commit names the content.
        small: of each small file its bytes and its mtime in ns, 0 where a commit names the content.
        stamps: of each shard of a directory two hashes, over its path and over its inode, each with size and times. A
            file with one of them in common was not touched in between.
    """

    place: str
    revision: str | None
    modified: Mapping[str, int]
    small: Mapping[str, list[int]]
    stamps: Stamps


class Identity(dict[str, Any]):
    """A run's identity, flat, so that differences have names; as a journal gives it back.

    Attributes:
        seen: how the run finds its source; None where there is none to look at.
    """

    def __init__(self, fields: Mapping[str, Any], seen: Seen | None = None) -> None:
        super().__init__(fields)
        self.seen = seen


@dataclass(frozen=True)
class Recorded:
    """What the first line of a journal says.

    Attributes:
        identity: of the run that made, or is making, the directory.
        stamps: see `Seen`; empty where none were recorded.
    """

    identity: dict[str, Any]
    stamps: Stamps = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ.

    Attributes:
        subject: ``recipe``, ``source``, ``processor``, ``library`` or ``program``.
        text: for people: ``calibration.samples: 64 then, 32 now``.
        key: the recipe's key; None where it is none.
        file: of the source, that changed.
        then: the value before; None where it cannot be said in a word.
        now: the value of this run.
    """

    subject: str
    text: str
    key: str | None = None
    file: str | None = None
    then: Any = None
    now: Any = None

    def as_json(self) -> dict[str, Any]:
        """Plain data, for programs; the keys are those of the attributes."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Comparison:
    """What a comparison of two runs found.

    Attributes:
        fields: of the identity, that differ; none: it is the same run, if the source's contents are the same.
        differences: the same, as a person wants to know it.
        moved: shards that may hold other bytes: what was read of them has to be compared.
        named: how the recipe names the source, where that changed: for the case that its contents did as well.
    """

    fields: frozenset[str]
    differences: tuple[Difference, ...]
    moved: frozenset[str]
    named: tuple[Difference, ...]


def compare(found: Recorded, now: Mapping[str, Any]) -> Comparison:
    """Hold a recorded identity against that of this run; nothing is read.

    Args:
        found: of a journal; also of the form that had the source's path and times in it.
        now: this run's.
    """
    before, seen = found.identity, getattr(now, "seen", None)
    moved: frozenset[str] = frozenset()
    if seen is not None and "recipe" not in before:
        before, moved = _converted(before, now, seen)
    elif seen is not None and not _same_commit(before, seen):
        moved = frozenset(
            name for name in seen.modified if not {*found.stamps.get(name, ())} & {*seen.stamps.get(name, ())}
        )
    fields = frozenset(
        key for key in {*before, *now} - EXPLAIN if not _same(key, before.get(key), now.get(key))
    )  # fmt: skip
    return Comparison(fields, tuple(_differences(before, now, fields)), moved, tuple(_source_keys(before, now)))


def _same_commit(before: Mapping[str, Any], seen: Seen) -> bool:
    """Whether both have their source from the same commit of the same hub id."""
    return seen.revision is not None and (before.get("source"), before.get("source.revision")) == (
        seen.place,
        seen.revision,
    )


def _same(key: str, old: Any, new: Any) -> bool:
    if key.startswith(SOURCE) and _is_shard(old) and _is_shard(new) and None in (old[2], new[2]):
        return bool(old[:2] == new[:2])  # a shard of the hub has no samples: its commit names the content
    return bool(old == new)


def _is_shard(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3


def _converted(old: Mapping[str, Any], now: Mapping[str, Any], seen: Seen) -> tuple[dict[str, Any], frozenset[str]]:
    """An identity of the earlier form in today's, and the shards whose contents have to be compared.

    It named the source's directory and had each file's mtime: ``[bytes, header, mtime, samples]`` of a shard, and
    ``[bytes, mtime]`` of a small file, whose contents it knew by these alone.
    """
    here = (old.get("source"), old.get("source.revision")) == (seen.place, seen.revision)
    made: dict[str, Any] = {key: value for key, value in old.items() if not key.startswith(SOURCE)}
    made |= {"recipe": {}, "source": str(old.get("source")).rpartition("/")[2]}
    made["source.revision"] = old.get("source.revision")
    if made["source.revision"] is not None:
        made["source"] = old.get("source")
    moved = set()
    for key, value in old.items():
        name = key.removeprefix(SOURCE)
        if not key.startswith(SOURCE) or key == "source.revision":
            continue
        if isinstance(value, list) and len(value) == 4:
            made[key] = [value[0], value[1], value[3]]
            if not here or value[2] != seen.modified.get(name):
                moved.add(name)
        else:
            made[key] = now.get(key) if here and value == seen.small.get(name) else {"unknown": value}
    return made, frozenset(moved)


# --- differences in words ----------------------------------------------------------------------------


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], fields: frozenset[str]) -> Iterator[Difference]:
    """Recipe keys first, then the source, then machine and programs."""
    made = [
        *_recipe_keys(before, now, fields),
        *_source_files(before, now, fields),
        *_others(before, now, fields - FOLLOW),
    ]
    if not made and fields:
        made = [Difference("program", "this program lays the same tensors out differently now")]
    yield from made


def _recipe_keys(before: Mapping[str, Any], now: Mapping[str, Any], fields: frozenset[str]) -> Iterator[Difference]:
    for key in ("backend", "scheme", "kv_cache", "ignore"):
        if key in fields:
            yield _changed(key, before.get(key), now.get(key))
    if "backend_options" in fields and not {"backend", "scheme"} & fields:
        old, new = before.get("backend_options") or {}, now.get("backend_options") or {}
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield _changed(f"backend_options.{key}", old.get(key), new.get(key))
    if "shard_size" in fields:
        old, new = before.get("shard_size"), now.get("shard_size")
        told = [size_text(size) if isinstance(size, int) else str(size) for size in (old, new)]
        if told[0] == told[1]:
            told = [f"{size:,} B" if isinstance(size, int) else str(size) for size in (old, new)]
        yield Difference("recipe", f"shard_size: {told[0]} then, {told[1]} now", "shard_size", None, old, new)
    if fields & {"calibration.batches", "calibration.batch_tokens"} and _in_both("calibration.batches", before, now):
        yield from _calibration_keys(before, now, fields)
    if "threads" in fields and _in_both("threads", before, now):
        yield _changed("runtime.threads", before["threads"], now["threads"])


def _calibration_keys(
    before: Mapping[str, Any], now: Mapping[str, Any], fields: frozenset[str]
) -> Iterator[Difference]:
    """What in the recipe's calibration makes other batches."""
    made: list[Difference] = []
    old, new = before.get("recipe") or {}, now.get("recipe") or {}
    if old and new:
        if old.get("calibration.captions") != new.get("calibration.captions"):
            made += _captions(old.get("calibration.captions") or {}, new.get("calibration.captions") or {})
        for key in sorted({*old, *new} - {"calibration.captions"}):
            if key.startswith("calibration.") and old.get(key) != new.get(key):
                made.append(_changed(key, old.get(key), new.get(key)))
    if "calibration.batch_tokens" in fields:
        key = "calibration.batch_tokens"
        made.append(_changed(key, before.get(key), now.get(key)))
    if not made:
        told = [value[0] if isinstance(value, list) and value else "" for value in
                (before["calibration.batches"], now["calibration.batches"])]  # fmt: skip
        text = "the same captions give other tokens" if told[0] == told[1] else f"{told[0]} then, {told[1]} now"
        made.append(Difference("recipe", f"calibration: {text}", "calibration", None, *told))
    yield from made


def _captions(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Difference]:
    """Captions are told apart by their contents, and named as the recipe names them."""
    key, then, now = "calibration.captions", old.get("name"), new.get("name")
    if old.get("sha256") == new.get("sha256"):
        return
    text = f"{then} then, {now} now" if then != now else f"the contents of {now} changed"
    yield Difference("recipe", f"{key}: {text}", key, None, then, now)


def _source_files(before: Mapping[str, Any], now: Mapping[str, Any], fields: frozenset[str]) -> list[Difference]:
    made = []
    for key in sorted(key for key in fields if key.startswith(SOURCE)):
        name, what = key.removeprefix(SOURCE), _what_changed(before.get(key), now.get(key))
        made.append(Difference("source", f"source: {name}: {what}", file=name))
    if len(made) > FILES_SAID:
        more = len(made) - FILES_SAID
        made = [*made[:FILES_SAID], Difference("source", f"source: and {more} more files")]
    return [*_source_keys(before, now), *made] if made else []


def _source_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    if before.get("source") != now.get("source"):
        yield _changed("model.source", before.get("source"), now.get("source"))
    elif before.get("source.revision") != now.get("source.revision"):
        yield _changed("model.revision", before.get("source.revision"), now.get("source.revision"))


def _what_changed(old: Any, new: Any) -> str:
    if old is None:
        return "it was not there then"
    if new is None:
        return "it is not there now"
    if isinstance(old, dict):
        return "it may have changed: the version of this program that recorded it knew its path and time alone"
    if not (_is_shard(old) and _is_shard(new)):
        return "its contents changed"
    if old[0] != new[0]:
        return f"{old[0]:,} bytes then, {new[0]:,} now"
    return "names, dtypes or shapes of its tensors changed" if old[1] != new[1] else "its weights changed"


def _others(before: Mapping[str, Any], now: Mapping[str, Any], fields: frozenset[str]) -> Iterator[Difference]:
    """Machine and programs. What only one of the two runs has follows from its scheme, and is said by that."""
    for key in sorted(fields):
        old, new = before.get(key), now.get(key)
        if not _in_both(key, before, now):
            continue
        if key == "device":
            text = f"processor: {old} then, {new} now; bits may differ"
            yield Difference("processor", text, None, None, old, new)
        elif key.startswith("library."):
            name = key.removeprefix("library.")
            yield Difference("library", f"{name} {old} then, {new} now", None, None, old, new)
        elif key == "pipeline":
            yield Difference("program", f"fp8-pipeline {old} then, {new} now", None, None, old, new)


def _in_both(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return key in before and key in now


def _changed(key: str, then: Any, now: Any) -> Difference:
    return Difference("recipe", f"{key}: {_short(then)} then, {_short(now)} now", key, None, then, now)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# --- refusals ----------------------------------------------------------------------------------------


def other_run(where: object, found: Comparison, begun: bool) -> OtherRun:
    """The refusal of what another run left.

    Args:
        where: the directory, for the message.
        found: in what the two differ.
        begun: it is unfinished work, not a published result.
    """
    lines = "\n".join(f"  {difference.text}" for difference in found.differences)
    subjects = {difference.subject for difference in found.differences}
    if begun:
        way = "put the source back as it was to go on, " if subjects == {"source"} else ""
        way = "run that recipe again to go on with it, " if "recipe" in subjects else way
        message, remedy = "another run began this; it differs in", f"{way}choose another output, or start over with"
    else:
        message = "it is the result of another run, which differs in"
        remedy = "choose another output, or replace it with"
    data = tuple(difference.as_json() for difference in found.differences)
    return OtherRun(f"{where}: {message}\n{lines}", found.fields, begun, f"{remedy} --fresh", data)


def with_contents(found: Comparison, changed: Sequence[Difference]) -> Comparison:
    """The same comparison, after the shards' contents were compared as well."""
    fields = found.fields | {f"{SOURCE}{difference.file}" for difference in changed}
    named = found.named if changed else ()
    return Comparison(fields, (*named, *changed, *found.differences), found.moved, found.named)
