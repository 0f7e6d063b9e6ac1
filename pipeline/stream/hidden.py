"""Hidden states between two layers: all batches in one block of BF16, on the GPU, in host memory or in a file."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.writer import sync_directory

if TYPE_CHECKING:
    from pipeline.plan.plan import Plan

CHUNK = 32 << 20


class Scratch:
    """The files that live as long as a run: in OUTPUT.partial, or in the recipe's work directory.

    Only files of this run's names are ever removed: the work directory is the user's. Its names hold a hash of the
    output's path, so that runs to several outputs of one name do not meet.
    """

    def __init__(self, plan: Plan, partial: Path) -> None:
        self._partial, work = partial, plan.recipe.runtime.work_directory
        self.directory = Path(work).expanduser().absolute() if work else partial / "quantize" / "hidden"
        mark = hashlib.sha256(str(partial.absolute()).encode()).hexdigest()[:12]
        self._prefix = f"{Path(plan.recipe.output).name}-{mark}-hidden-" if work else "hidden-"

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


class HiddenStates:
    """The states of every batch, [rows, length, hidden], taken and put back layer by layer.

    Args:
        plan: with a calibration; says how many tokens and where they wait.
        device: what computes.
        scratch: has the file, where they wait in one.
    """

    def __init__(self, plan: Plan, device: Any, scratch: Scratch) -> None:
        import torch

        assert plan.calibration is not None
        self._device = device
        self._shapes: list[tuple[int, int]] = []
        self._starts = [0]
        for batch in plan.calibration.batches.batches:
            self._shapes.append((batch.rows, batch.length))
            self._starts.append(self._starts[-1] + batch.tokens)
        width = plan.calibration.needs.hidden // (2 * self._starts[-1])
        shape, place = (self._starts[-1], width), plan.calibration.place
        if place == "device":
            self._all = torch.empty(shape, dtype=torch.bfloat16, device=device)
        elif place == "host":
            self._all = torch.empty(shape, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
        else:
            path = scratch.file("now")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            flat = torch.from_file(str(path), shared=True, size=shape[0] * width, dtype=torch.bfloat16)
            path.unlink()  # the mapping holds it; nothing stays behind, however this process ends
            self._all = flat.view(shape)

    def take(self, number: int) -> Any:
        """A batch's states on the device."""
        return self._view(number).to(self._device, non_blocking=True)

    def put(self, number: int, state: Any) -> None:
        """A batch's states after a layer."""
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
                    data = memoryview(part.cpu().contiguous().view(-1).view(_uint8()).numpy())
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
                part.copy_(_bf16(data).view(part.shape))
        return True

    def _chunks(self) -> Any:
        step = max(1, CHUNK // (2 * self._all.shape[1]))
        return (self._all[start : start + step] for start in range(0, len(self._all), step))

    def close(self) -> None:
        """Let go of the memory."""
        del self._all


def _uint8() -> Any:
    import torch

    return torch.uint8


def _bf16(data: bytearray) -> Any:
    import torch

    return torch.frombuffer(data, dtype=torch.bfloat16)
