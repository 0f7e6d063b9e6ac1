"""Tensors as bytes: their dtypes, their hashes, and the check for NaN and Inf that every weight passes."""

from __future__ import annotations

import hashlib
from typing import Any

import xxhash

from pipeline.backends.fp8 import Buffer, NonFiniteWeight, check_finite
from pipeline.checkpoint.source import DTYPES, SourceError
from pipeline.journal import Digest


def torch_dtypes() -> dict[str, Any]:
    """The torch dtypes of the names that safetensors gives them: of every dtype that a plan takes."""
    import torch

    return {name: getattr(torch, kind) for name, (_, kind) in DTYPES.items()}


def bytes_of(value: Any) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    import torch

    return memoryview(value.contiguous().view(-1).view(torch.uint8).numpy())


def digest_of(tensor: str, offset: int, data: memoryview) -> Digest:
    """The journal's record of bytes that belong at `offset` of an output shard, in output tensor `tensor`."""
    return Digest(tensor, offset, len(data), hashlib.sha256(data).hexdigest())


# of the source's bytes, as a unit read them: XXH3 of 128 bits costs the stream nothing (a tenth of SHA-256), and no
# change that happens to a file leaves it the same
SourceHash = xxhash.xxh3_128


def source_hash(data: Buffer) -> str:
    """What the journal keeps of a range of the source, to know it again."""
    return SourceHash(data).hexdigest()


def is_weight(name: str) -> bool:
    """Whether a source tensor has to be finite: a mask in a buffer may well hold -Inf."""
    return name.endswith((".weight", ".bias", "_proj"))


def refuse_not_finite(name: str, dtype: str, data: Buffer) -> None:
    """Raise SourceError where the bytes of source tensor `name` hold NaN or Inf."""
    try:
        check_finite(data, dtype)
    except NonFiniteWeight:
        raise not_finite(name) from None


def not_finite(name: str, row: int | None = None) -> SourceError:
    """The error for a source tensor that holds NaN or Inf, in row `row` where that is known."""
    where = "" if row is None else f" in row {row}"
    return SourceError(
        f"{name}: NaN or Inf{where}", remedy="the checkpoint is damaged or the training diverged, use a sound one"
    )
