"""Arguments of vllm serve: their names, their values, and which of them a recipe keeps to itself."""

from __future__ import annotations

import re
from typing import Any

# Arguments of vllm serve that the profile works out and checks, and what to write instead; see `Serve.extra`
_KEPT = {
    "config": "it would be another profile than the one that is checked; put its arguments here",
    "gpu-memory-utilization": "use serve.gpu_memory_utilization",
    "hf-overrides": "serve.rope_scaling is written there, and one would undo the other; leave one of them out",
    "kv-cache-dtype": "use serve.kv_cache_dtype",
    "kv-cache-memory-bytes": "vLLM would no longer heed its share of the GPU; use serve.gpu_memory_utilization",
    "limit-mm-per-prompt": "use serve.limit_mm_per_prompt",
    "max-model-len": "use serve.max_model_len",
    "max-num-seqs": "use serve.max_num_seqs",
    "model": "the profile is for the result alone, which the command line names",
    "rope-parameters": "use serve.rope_scaling",
    "rope-scaling": "use serve.rope_scaling",
    "rope-theta": "the model's own is kept; use serve.rope_scaling for longer contexts",
    "served-model-name": "use serve.served_model_name",
    "tensor-parallel-size": "use serve.tensor_parallel_size",
    "tp": "use serve.tensor_parallel_size",
}
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # YAML ends a comment at some of them


def name_problem(name: str) -> str | None:
    """What keeps a text from being a served name, or from a line of a profile's head; None where nothing does."""
    if name.startswith("-"):
        return "vLLM would read a name that begins with a dash as an option; choose another"
    return "it holds a control character; a name is plain text" if _UNPRINTABLE.search(name) else None


def argument_name(name: str) -> str:
    """An argument's name as vLLM spells it: ``--Max_Num_Seqs`` is max-num-seqs; after a dot it is kept as it is."""
    head, dot, rest = name.lstrip("-").partition(".")
    head = head.replace("_", "-").lower()
    if not re.fullmatch(r"[a-z][a-z0-9-]*", head) or not re.fullmatch(r"[\w.+-]*", rest):
        raise ValueError(
            f"{name!r} is no argument's name; write it as vllm serve --help does, without dashes before it"
        )
    return head + dot + rest


def kept_argument(key: str, scaled: bool) -> str | None:
    """Why an argument is not the recipe's to pass on. vLLM takes the beginning of a name for the whole, too."""
    head = key.partition(".")[0]
    for name, why in _KEPT.items():
        if name.startswith(head) and (name != "hf-overrides" or scaled):
            return why if head == name else f"vLLM would take it for {name}: {why}"
    return None


def value_problem(value: Any) -> str | None:
    """What is wrong with an argument's value: vLLM makes words of plain values and lists, and JSON of mappings."""
    if value is None or value == []:
        return "it has no value; give it one, or leave it out"
    if isinstance(value, list) and any(isinstance(item, list | dict) or item is None for item in value):
        return "a list holds words or numbers; anything deeper is no list that vLLM reads"
    return _json_problem(value)


def _json_problem(value: Any, depth: int = 0) -> str | None:
    if isinstance(value, dict | list):
        if depth > 20:
            return "it is nested too deeply"
        inner = value.values() if isinstance(value, dict) else value
        return next((why for item in inner if (why := _json_problem(item, depth + 1))), None)
    if isinstance(value, int | float) and not abs(value) < 2**63:  # nor inf, nor nan
        return "a number here is finite, and of 64 bits at most"
    return None if value is None or isinstance(value, str | int | float) else f"{value!r} is no plain value"
