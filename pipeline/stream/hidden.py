"""The activation cache: the hidden states of all batches between two layers, and the files they may lie in."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.calibration.placement import Place
from pipeline.checkpoint.writer import sync_directory
from pipeline.stream.tensor_bytes import bytes_of

CHUNK = 32 << 20


class Scratch:
    """The files that live as long as a run: in OUTPUT.partial, or in the recipe's work directory.

    Only files of this run's names are ever removed: the work directory is the user's. Its names hold a hash of the
    output's path, so that runs to several outputs of one name do not meet.

    Args:
        output: as the recipe names it.
        partial: where it is made.
        work_directory: the recipe's ``runtime.work_directory``; None for a directory within `partial`.
    """

    def __init__(self, output: str, partial: Path, work_directory: str | None) -> None:
        self._partial = partial
        own = partial / "quantize" / "hidden"
        self.directory = Path(work_directory).expanduser().absolute() if work_directory else own
        mark = hashlib.sha256(str(partial.absolute()).encode()).hexdigest()[:12]
        self._prefix = f"{Path(output).name}-{mark}-hidden-" if work_directory else "hidden-"

    def file(self, name: str) -> Path:
        """A file of this run."""
        return self.directory / f"{self._prefix}{name}.bin"

    def relative(self, path: Path) -> str:
        """A path as the journal holds it: from OUTPUT.partial on, where it lies there."""
        return str(path.relative_to(self._partial)) if path.is_relative_to(self._partial) else str(path)

    def clear(self) -> None:
        """Remove this run's files, and the directory where it is the run's own."""
        for path in self.directory.glob(f"{glob.escape(self._prefix)}*"):
            path.unlink(missing_ok=True)
        if self.directory.is_relative_to(self._partial):
            with contextlib.suppress(OSError):
                self.directory.rmdir()


class ActivationCache:
    """The hidden states of every batch, [rows, length, width] each, taken and put back layer by layer.

    They lie in one block of BF16: on the GPU, in host memory or in a file.

    Args:
        shapes: rows and length of every batch.
        width: of a hidden state.
        device: what computes, a ``torch.device``.
        placement: where they wait between two layers.
        path: of the file, where `placement` is ``file``; it has no name any more once it is open.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], width: int, device: Any, placement: Place, path: Path | None = None
    ) -> None:
        import torch

        self._device, self._shapes = device, shapes
        self._starts = [0]
        for rows, length in shapes:
            self._starts.append(self._starts[-1] + rows * length)
        shape = self._starts[-1], width
        if placement == "device":
            self._all = torch.empty(shape, dtype=torch.bfloat16, device=device)
        elif placement == "host":
            self._all = torch.empty(shape, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
        else:
            assert path is not None, "placement: file"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            flat = torch.from_file(str(path), shared=True, size=shape[0] * width, dtype=torch.bfloat16)
            path.unlink()  # the mapping holds it; nothing stays behind, however this process ends
            self._all = flat.view(shape)

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._all  # an exception's traceback may keep this object, but not its memory

    def take(self, number: int) -> Any:
        """The states of batch `number`, on the device."""
        return self._view(number).to(self._device, non_blocking=True)

    def put(self, number: int, state: Any) -> None:
        """Keep the states of batch `number` after a layer."""
        self._view(number).copy_(state, non_blocking=self._all.is_pinned())

    def _view(self, number: int) -> Any:
        rows, length = self._shapes[number]
        return self._all[self._starts[number] : self._starts[number + 1]].view(rows, length, -1)

    def save(self, path: Path) -> tuple[int, str]:
        """Write all states to a file, durably and all at once; returns its length and SHA-256."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft, digest, nbytes = path.with_suffix(".new"), hashlib.sha256(), 0
        try:
            with draft.open("wb") as file:
                for part in self._chunks():
                    data = bytes_of(part.cpu())
                    digest.update(data)
                    file.write(data)
                    nbytes += len(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            sync_directory(path.parent)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
        return nbytes, digest.hexdigest()

    def load(self, path: Path, nbytes: int, sha256: str) -> bool:
        """Fill in the states from a file; False, and nothing changed, where it is not what was saved."""
        import torch

        try:
            if path.stat().st_size != nbytes or nbytes != self._all.numel() * 2:
                return False
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
        except OSError:
            return False
        with path.open("rb") as file:  # from here on a failing drive ends the run: states would be half filled in
            for part in self._chunks():
                data = bytearray(part.numel() * 2)
                file.readinto(data)
                part.copy_(torch.frombuffer(data, dtype=torch.bfloat16).view(part.shape))
        return True

    def _chunks(self) -> Iterator[Any]:
        step = max(1, CHUNK // (2 * self._all.shape[1]))
        return (self._all[start : start + step] for start in range(0, len(self._all), step))
