"""Modules that vLLM fuses into one GEMM with one quantization scheme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# What vLLM merges into one GEMM with one quantization scheme (packed_modules_mapping of its models).
FUSED_LINEARS = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
)


def fused_groups(names: Iterable[str]) -> Iterator[list[str]]:
    """The modules that vLLM runs as one GEMM: q/k/v, gate/up and the like, within one parent."""
    known = dict.fromkeys(names)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in known):
        for _, parts in FUSED_LINEARS:
            found = [f"{parent}.{part}" for part in parts if f"{parent}.{part}" in known]
            if len(found) > 1:
                yield found
