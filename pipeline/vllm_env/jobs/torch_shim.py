"""Lets vLLM start where a CPU build of torch stands beside CUDA builds of torchvision, torchaudio and torchcodec.

Their compiled parts cannot load there. scripts/setup_vllm.sh puts this file into the CPU environment's site-packages
and has it imported at every start, since vLLM starts processes of its own. torchaudio and torchcodec are hidden:
transformers and vLLM do without them. torchvision gets the two operators that its import insists on; its transforms
are pure torch and work.
"""

from __future__ import annotations

import importlib.machinery
from typing import Any

_find_spec = importlib.machinery.PathFinder.find_spec.__func__  # type: ignore[attr-defined]
_library: Any = None


def _find(cls: Any, name: str, path: Any = None, target: Any = None) -> Any:
    global _library
    if name in ("torchaudio", "torchcodec"):
        return None
    if name == "torchvision" and _library is None:
        import torch

        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _find_spec(cls, name, path, target)


importlib.machinery.PathFinder.find_spec = classmethod(_find)  # type: ignore[assignment]
