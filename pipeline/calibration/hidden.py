"""Hidden states between two layers: all batches in one block of BF16, on the GPU, in host memory or in a file."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint.writer import sync_directory

if TYPE_CHECKING:
    from pipeline.plan import Plan

CHUNK = 32 << 20


def scratch(plan: Plan, partial: Path) -> Path:
    """The directory of files that live as long as a run: below the recipe's work directory, or in OUTPUT.partial."""
    work = plan.recipe.runtime.work_directory
    if work is None:
        return partial / "quantize" / "hidden"
    return Path(work).expanduser().absolute() / f"{Path(plan.recipe.output).name}.hidden"


def clear_scratch(plan: Plan, partial: Path) -> None:
    """Remove what `scratch` holds."""
    shutil.rmtree(scratch(plan, partial), ignore_errors=True)


class HiddenStates:
    """The states of every batch, [rows, length, hidden], taken and put back layer by layer.

    Args:
        plan: with a calibration; says how many tokens and where they wait.
        device: what computes.
        directory: of the file, where they wait in one.
    """

    def __init__(self, plan: Plan, device: Any, directory: Path) -> None:
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
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / "hidden-now.bin"
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
        return nbytes, digest.hexdigest()

    def load(self, path: Path, nbytes: int, sha256: str) -> bool:
        """Fill in the states from a file; False, and nothing changed, where it is not what was saved."""
        try:
            if path.stat().st_size != nbytes or nbytes != self._all.numel() * 2:
                return False
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
                file.seek(0)
                for part in self._chunks():
                    data = bytearray(part.numel() * 2)
                    file.readinto(data)
                    part.copy_(_bf16(data).view(part.shape))
        except FileNotFoundError:
            return False
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
