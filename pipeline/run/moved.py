"""A source that lies elsewhere, or whose files have other times: is it the one that was read?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.checkpoint.reader import announce, open_shard, read_exactly
from pipeline.checkpoint.source import Shard
from pipeline.identity import Difference
from pipeline.journal import Contents, State
from pipeline.stream.tensor_bytes import SourceHash
from pipeline.units import size_text

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

CHUNK = 16 << 20
Say = Callable[[str], None]
Range = tuple[int, str, int, int]  # of a source shard: its number, the tensor, offset, bytes


def contents_of(plan: Plan, say: Say) -> Contents:
    """`compare_with_source` for this plan, as a journal asks for it."""
    return lambda state, moved: compare_with_source(plan, state, moved, say)


def compare_with_source(plan: Plan, state: State, moved: frozenset[str], say: Say) -> list[Difference]:
    """Read again what finished units read of these shards, and compare its hashes with those in the journal.

    What is not finished is not compared: it is read when it is converted, and belongs to the source as it is then.

    Args:
        plan: of this run, whose units are those of the journal.
        state: of the journal.
        moved: names of shards.
        say: told what is read, and how much that is.

    Returns:
        The first difference; none where every byte is the same.

    Raises:
        SourceError: a shard cannot be read.
    """
    shards = plan.checkpoint.shards
    wanted = {index for index, shard in enumerate(shards) if shard.name in moved}
    found: list[tuple[Range, str]] = []
    for unit, ranges in _ranges(plan):
        here = [one for one in ranges if one[0] in wanted]
        if unit not in state.done or not here:
            continue
        hashes = state.sources.get(unit, [])
        if len(hashes) != len(ranges):
            name = shards[here[0][0]].name
            why = "it was moved or touched, and the version of this program that read it kept no hashes of it"
            return [Difference("source", f"source: {name}: {why}", file=name)]
        found += [(one, digest) for one, digest in zip(ranges, hashes, strict=True) if one[0] in wanted]
    if absent := [shards[one[0]].name for one, _ in found if shards[one[0]].path is None]:
        why = "it has to be fetched before it can be compared with what was read"
        return [Difference("source", f"source: {absent[0]}: {why}", file=absent[0])]
    if not found:
        return []
    nbytes = sum(one[3] for one, _ in found)
    say(f"the source was moved, copied or touched: {size_text(nbytes)} of it are compared with what was read")
    found.sort(key=lambda each: (each[0][0], each[0][2]))
    for index in sorted({one[0] for one, _ in found}):
        if (tensor := _first_changed(shards[index], [each for each in found if each[0][0] == index])) is not None:
            name = shards[index].name
            text = f"source: {name}: the bytes of {tensor} changed since they were read"
            return [Difference("source", text, file=name)]
    return []


def _ranges(plan: Plan) -> Iterator[tuple[int, list[Range]]]:
    """What each unit reads, in the order in which the stream records its hashes."""
    units: dict[int, list[Range]] = {}
    for piece in plan.pieces:
        units.setdefault(piece.unit, []).append((piece.shard, piece.tensor, piece.offset, piece.nbytes))
    yield from units.items()
    for layer in plan.layers:
        yield layer.unit, [(tensor.shard, tensor.name, tensor.offset, tensor.nbytes) for tensor in layer.tensors]


def _first_changed(shard: Shard, ranges: list[tuple[Range, str]]) -> str | None:
    """The first tensor of a shard that holds other bytes; None where there is none."""
    file, buffer = open_shard(shard), memoryview(bytearray(CHUNK))
    try:
        for (_, tensor, offset, nbytes), digest in ranges:
            seen = SourceHash()
            for start in range(0, nbytes, CHUNK):
                count = min(CHUNK, nbytes - start)
                announce(file, offset + start + count, 4 * CHUNK)
                read_exactly(file, shard, tensor, offset + start, buffer[:count])
                seen.update(buffer[:count])
            if seen.hexdigest() != digest:
                return tensor
    finally:
        os.close(file)
    return None
