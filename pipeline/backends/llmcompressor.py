"""llm-compressor's FP8_DYNAMIC: E4M3 weights with a scale a row; activations are scaled per token while serving.

The bits, names and the config section are those of llm-compressor 0.13.0's ``oneshot`` and
``save_pretrained`` (tests/test_equal_llmcompressor.py compares them).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from pipeline.backends.base import Output
from pipeline.backends.fp8 import Buffer, row_quantizer
from pipeline.model.selection import Selection

_ARGUMENTS: dict[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "group_size": None,
    "num_bits": 8,
    "observer_kwargs": {},
    "scale_dtype": None,
    "symmetric": True,
    "type": "float",
    "zp_dtype": None,
}


class FP8Dynamic:
    """Backend ``llmcompressor``, scheme ``fp8_dynamic``."""

    name = "llmcompressor"
    scheme = "fp8_dynamic"

    def outputs(self, dtype: str, rows: int, columns: int) -> tuple[Output, Output]:
        """Codes as ``weight`` in F8_E4M3, scales as ``weight_scale`` of shape (rows, 1) in the source's dtype."""
        return Output("weight", "F8_E4M3", (rows, columns)), Output("weight_scale", dtype, (rows, 1))

    def quantizer(self, dtype: str) -> Callable[[Buffer, Buffer, Buffer, int, int], None]:
        """Quantizes rows of BF16, F16 or F32."""
        return row_quantizer(dtype)

    def config_section(self, selection: Selection) -> dict[str, Any]:
        """As compressed-tensors writes it, with an ``ignore`` that also holds where vLLM renames and fuses.

        vLLM merges q/k/v of some vision towers and then finds no literal name of the merged module
        (facts: LLaVA-OneVision), so every part outside the language model is named once more by a pattern.
        """
        return {
            "config_groups": self.groups(),
            "format": "float-quantized",
            "global_compression_ratio": None,
            "ignore": [*selection.kept_linears, *_patterns(selection)],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": version("compressed-tensors"),
        }

    @staticmethod
    def groups() -> dict[str, dict[str, Any]]:
        """The ``config_groups``: which modules, and how weights and activations are quantized."""
        return {
            "group_0": {
                "format": "float-quantized",
                "input_activations": {**_ARGUMENTS, "dynamic": True, "observer": None, "strategy": "token"},
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**_ARGUMENTS, "dynamic": False, "observer": "memoryless_minmax", "strategy": "channel"},
            }
        }

    def versions(self, dtypes: set[str]) -> dict[str, str]:
        """compressed-tensors' numerics decide every bit; torch computes them where the kernel does not."""
        found = {"compressed-tensors": version("compressed-tensors")}
        if dtypes - {"BF16"}:
            found["torch"] = version("torch")
        return found


def _patterns(selection: Selection) -> list[str]:
    """One regular expression for each part outside, unless it would also match inside the language model."""
    patterns = []
    inside = [
        name.removesuffix(".weight")
        for name, choice in selection.choices.items()
        if choice.role in ("linear", "experts")
    ]
    for component in selection.outside:
        last = component.rpartition(".")[2]
        if last.isdigit():
            continue
        pattern = rf"(?:.*\.)?{re.escape(last)}(?:\..*)?$"
        if not any(re.match(pattern, name) for name in inside):
            patterns.append(f"re:{pattern}")
    return list(dict.fromkeys(patterns))
