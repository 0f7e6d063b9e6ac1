"""The identity of a plan's run, and what the run sees of its source; see `pipeline.identity`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.layout import OutputShard
from pipeline.checkpoint.source import Checkpoint
from pipeline.identity import Identity, Seen
from pipeline.plan.layout import PIECE_BYTES, UNIT_BYTES

if TYPE_CHECKING:
    from pipeline.calibration.captions import CaptionSet
    from pipeline.plan.calibration import CalibrationPlan
    from pipeline.recipe.recipe import Recipe

SAMPLES, SAMPLE_BYTES = 8, 4096


def identity_of(
    recipe: Recipe,
    checkpoint: Checkpoint,
    shards: Sequence[OutputShard],
    versions: Mapping[str, str],
    calibration: CalibrationPlan | None,
    threads: int,
) -> Identity:
    """What must be the same for a run to go on where another stopped.

    It holds no path of this machine, and nothing that a copy of the source does not share. The values under
    ``recipe`` decide nothing: they name what made other batches.

    Args:
        recipe: validated.
        checkpoint: the source; read for samples of its shards and for its small files.
        shards: of the output.
        versions: of this program and of the libraries that decide bits, by field of the identity.
        calibration: of a calibrated run.
        threads: that compute; they decide bits of activations on a CPU.

    Raises:
        OSError: a file of the source cannot be read.
    """
    asked = recipe.model_dump(include={"backend", "scheme", "kv_cache", "ignore", "backend_options"})
    found: dict[str, Any] = {**versions, **asked, "shard_size": recipe.shard_bytes, "recipe": {}}
    on_hub = checkpoint.revision is not None
    found["source"] = checkpoint.label if on_hub else checkpoint.root.resolve().name
    found["source.revision"] = checkpoint.revision
    for shard in checkpoint.shards:  # another fine-tune of the same model has the same headers
        sample = None if on_hub or shard.path is None else _sample(shard.path, shard.size)
        found[f"source.{shard.name}"] = [shard.size, shard.header_sha256, sample]
    for name in checkpoint.sidecars:
        found[f"source.{name}"] = hashlib.sha256((checkpoint.root / name).read_bytes()).hexdigest()
    found["layout"] = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
    found["units"] = [PIECE_BYTES, UNIT_BYTES]
    if calibration is not None:  # what decides the bits of activations
        batches = calibration.batches  # captions, seed, template: whatever gives the same batches is the same
        found["calibration.batches"] = [f"{batches.samples} captions, {batches.tokens} tokens", batches.digest]
        assert recipe.calibration is not None
        found["calibration.batch_tokens"] = recipe.calibration.batch_tokens
        found["device"] = calibration.device.name
        if calibration.device.kind == "cpu":
            found["threads"] = threads
        keys = recipe.calibration.model_dump(exclude={"captions", "batch_tokens"})
        found["recipe"] = {f"calibration.{key}": value for key, value in keys.items()}
        found["recipe"]["calibration.captions"] = _captions(calibration.captions)
    plain: dict[str, Any] = json.loads(json.dumps(found))  # as a journal gives it back
    return Identity(plain, _seen(checkpoint))


def _captions(captions: CaptionSet) -> dict[str, str]:
    """How the recipe names the captions, without a path, and a hash of what they were chosen from."""
    path = Path(captions.origin).expanduser()
    digest = hashlib.sha256(json.dumps([content for _, content in captions.files]).encode()).hexdigest()
    return {"name": path.resolve().name if path.exists() else captions.origin, "sha256": digest}


def _seen(checkpoint: Checkpoint) -> Seen:
    on_hub = checkpoint.revision is not None
    small = {}
    for name in checkpoint.sidecars:
        status = (checkpoint.root / name).stat()
        small[name] = [status.st_size, 0 if on_hub else status.st_mtime_ns]
    return Seen(
        place=checkpoint.label if on_hub else str(checkpoint.root.resolve()),
        revision=checkpoint.revision,
        modified={shard.name: shard.modified for shard in checkpoint.shards},
        small=small,
        stamps={} if on_hub else {s.name: _stamps(s.path) for s in checkpoint.shards if s.path is not None},
    )


def _stamps(path: Path) -> list[str]:
    """Hashes, since a journal is published: they tell nobody a path. The time of the last change (ctime) cannot be set.

    The path is the same after a file system was mounted anew, the inode after a directory got another name.
    """
    status = path.stat()
    times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    keys = ([os.path.realpath(path), *times], [status.st_dev, status.st_ino, *times])
    return [hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32] for key in keys]


def _sample(path: Path, size: int) -> str:
    """SHA-256 over a few blocks spread over a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(1, SAMPLES + 1):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, size * number // (SAMPLES + 1)))
    return digest.hexdigest()
