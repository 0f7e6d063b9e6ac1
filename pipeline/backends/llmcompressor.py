"""llm-compressor's FP8_DYNAMIC: E4M3 weights with a scale a row; activations are scaled per token while serving.

The bits, names and the config section are those of llm-compressor 0.13.0's ``oneshot`` and
``save_pretrained`` (tests/test_equal_llmcompressor.py compares them). With KV scales the weights are the same; the
scales come from the largest key, value and query of all batches, where llm-compressor's default observer keeps the
last batch only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.backends.base import Output, Ranges, cache_scales
from pipeline.backends.fp8 import Buffer, row_quantizer
from pipeline.formats.kv_scales import SCALE_NAMES
from pipeline.model.selection import Selection

if TYPE_CHECKING:
    from pipeline.checkpoint.source import Checkpoint
    from pipeline.model.skeleton import Layer, Skeleton

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
    import_seconds = 0.0
    forward_cost = 0.0

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

    def extra_files(self, checkpoint: Checkpoint, selection: Selection) -> dict[str, Any]:
        """None: compressed-tensors has everything in config.json."""
        return {}

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


class FP8DynamicKV(FP8Dynamic):
    """The same weights, and calibrated KV scales."""

    import_seconds = 0.2
    forward_cost = 0.6  # keys, values and queries alone are observed

    def __init__(self) -> None:
        self._seen: dict[Any, list[Any]] = {}  # attention module to largest key, value and query so far

    def attention_outputs(self) -> tuple[Output, ...]:
        """One scale each for keys, values and queries, BF16 of shape (1,), as compressed-tensors holds them."""
        names = SCALE_NAMES["compressed-tensors"]
        return tuple(Output(name, "BF16", names.shape) for name in names.names.values())

    def config_section(self, selection: Selection) -> dict[str, Any]:
        """With the ``kv_cache_scheme`` that makes vLLM use the scales."""
        scheme = {**_ARGUMENTS, "dynamic": False, "observer": "static_minmax", "strategy": "tensor"}
        return {**super().config_section(selection), "kv_cache_scheme": scheme}

    def versions(self, dtypes: set[str]) -> dict[str, str]:
        """transformers and torch make the activations."""
        return {**super().versions(dtypes), "torch": version("torch"), "transformers": version("transformers")}

    def prepare(self, skeleton: Skeleton, selection: Selection) -> None:
        """Register an attention function that looks at keys, values and queries, then hands on to sdpa's."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def looking(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            found = [states.detach().abs().amax() for states in (key, value, query)]
            before = self._seen.get(module)
            self._seen[module] = found if before is None else [torch.maximum(a, b) for a, b in zip(before, found)]
            return inner(module, query, key, value, *args, **kwargs)

        AttentionInterface.register("pipeline_ranges", looking)
        AttentionMaskInterface.register("pipeline_ranges", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        skeleton.model.set_attn_implementation("pipeline_ranges")

    def calibrate(self, layer: Layer, forward: Callable[[], None], probe: Callable[[], Any]) -> Ranges:
        """The running maximum over all batches; torch.maximum hands NaN on, so that it is found."""
        forward()
        ranges = Ranges()
        for module in layer.module.modules():
            if module in self._seen:
                found = [float(value.item()) for value in self._seen.pop(module)]
                ranges.attention = dict(zip("kvq", found, strict=True))
        return ranges

    def finish(self, layer: Layer, ranges: Ranges) -> dict[str, Any]:
        """The KV scales alone: weights need no data."""
        import torch

        if layer.attention is None:
            return {}
        names = SCALE_NAMES["compressed-tensors"]
        scales = cache_scales(layer.attention, ranges)
        return {
            f"{layer.attention}.{names.names[key]}": torch.full(names.shape, scale, dtype=torch.bfloat16)
            for key, scale in scales.items()
        }


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
