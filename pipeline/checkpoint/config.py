"""What a config.json says of the language model, wherever a family keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model; the whole, where there is no such part."""
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, dict):
            return part
    thinker = config.get("thinker_config")
    return text_config(thinker) if isinstance(thinker, dict) else config


def head_is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding: said somewhere, and denied nowhere."""
    parts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(said) and all(said)
