"""Where an exception of vLLM's comes from, and what vLLM's registries know: facts that tell what cannot be judged here.

What an exception says is for people and changes with every release; its type, and the module that raised it, do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def of(error: BaseException, phase: str) -> dict[str, Any]:
    """An exception as plain data.

    Args:
        error: pydantic's own, over a config, stands for the one within.
        phase: what vLLM was at: ``model`` (config, class and layers), ``weights`` or ``engine``.

    Returns:
        ``type``; ``bases``, the names of the classes that it is of; ``phase``; ``frames``, the functions that it came
        through as ``module.function``, the innermost first.
    """
    inner = _within(error)
    frames = []
    step = inner.__traceback__
    while step is not None:
        frames.append(f"{step.tb_frame.f_globals.get('__name__', '?')}.{step.tb_frame.f_code.co_name}")
        step = step.tb_next
    kind = type(inner)
    return {
        "type": f"{kind.__module__}.{kind.__qualname__}",
        "bases": [each.__name__ for each in kind.__mro__ if each is not object],
        "phase": phase,
        "frames": frames[::-1],
    }


def _within(error: BaseException) -> BaseException:
    """What a validator raised, which pydantic hides in an exception of its own."""
    try:
        from pydantic import ValidationError
    except ImportError:
        return error
    if not isinstance(error, ValidationError):
        return error
    for entry in error.errors():
        cause = (entry.get("ctx") or {}).get("error")
        if isinstance(cause, BaseException):
            return _within(cause)
    return error


def registered(checkpoint: Path) -> dict[str, Any]:
    """What vLLM's registries hold of what a config names.

    Returns:
        ``architectures``: ``named`` in the config, the ``known`` of these, and the ``usable``, whose classes this build
        can import; ``quant_method``: ``named``, and whether it is ``known``; null where the config names none.
    """
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        section = config.get("quantization_config") or config.get("compression_config") or {}
        named = [name for name in config.get("architectures") or [] if isinstance(name, str)]
        method = section.get("quant_method") if isinstance(section, dict) else None
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    found: dict[str, Any] = {"architectures": None, "quant_method": None}
    try:
        from vllm import ModelRegistry

        known = [name for name in named if name in ModelRegistry.get_supported_archs()]
        found["architectures"] = {"named": named, "known": known, "usable": [n for n in known if _imports(n)]}
    except Exception:  # another version: nothing is known of its classes
        pass
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        if isinstance(method, str):
            found["quant_method"] = {"named": method, "known": method in QUANTIZATION_METHODS}
    except ImportError:
        pass
    return found


def _imports(architecture: str) -> bool:
    """Whether the class that vLLM has for an architecture can be imported in this build."""
    from vllm import ModelRegistry

    try:
        return ModelRegistry.models[architecture].load_model_cls() is not None
    except Exception:
        return False
