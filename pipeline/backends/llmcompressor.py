"""llm-compressor's FP8_DYNAMIC: E4M3 weights with per-channel scales; activations are scaled per token while serving.

The bits, names and the config section are those of llm-compressor 0.13.0's ``oneshot`` and
``save_pretrained`` (tests/test_equal_llmcompressor.py compares them). With KV scales the weights are the same; the
scales come from the largest key, value and query of all batches, where llm-compressor's default observer keeps the
last batch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pipeline.backends.attention import AttentionObserver, scale_tensors
from pipeline.backends.base import Observed
from pipeline.backends.fp8 import Buffer, kernel, row_quantizer
from pipeline.checkpoint.source import DTYPE_BYTES
from pipeline.formats.base import Output, Requantized
from pipeline.formats.kv_scales import COMPRESSED_NAMES
from pipeline.formats.methods import COMPRESSED
from pipeline.model.selection import Selection, outside_patterns

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
    format = COMPRESSED
    needs_data = False
    weights_need_data = False
    tags: tuple[str, ...] = ("compressed-tensors", "llm-compressor")
    card = (
        "Weights of the language model's linear layers are quantized per-channel; activations are quantized per token\n"
        "while serving (llm-compressor's `FP8_DYNAMIC`, compressed-tensors format). Everything else is byte for byte\n"
        "the source's."
    )
    expert_rule = "their weights' scales need no tokens, their activations are scaled while serving"
    import_seconds = 0.0
    forward_cost = 0.0

    def attention_outputs(self) -> tuple[Output, ...]:
        """None: the KV cache stays BF16."""
        return ()

    def load_libraries(self) -> None:
        """Nothing: compressed-tensors is imported where it is used."""

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
            "ignore": [*selection.kept_linears, *outside_patterns(selection)],
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

    def imports_torch(self, dtypes: set[str]) -> bool:
        """The compiled kernel knows BF16; anything else is compressed-tensors'."""
        return kernel() is None or bool(dtypes - {"BF16"})


class FP8DynamicKV(FP8Dynamic):
    """The same weights, and calibrated KV scales."""

    needs_data = True
    import_seconds = 0.2
    forward_cost = 0.6  # keys, values and queries alone are observed

    def __init__(self) -> None:
        self._observer = AttentionObserver()

    def attention_outputs(self) -> tuple[Output, ...]:
        """One scale each for keys, values and queries, BF16 of shape (1,), as compressed-tensors holds them."""
        return COMPRESSED_NAMES.outputs()

    def config_section(self, selection: Selection) -> dict[str, Any]:
        """With the ``kv_cache_scheme`` that makes vLLM use the scales."""
        scheme = {**_ARGUMENTS, "dynamic": False, "observer": "static_minmax", "strategy": "tensor"}
        return {**super().config_section(selection), "kv_cache_scheme": scheme}

    def versions(self, dtypes: set[str]) -> dict[str, str]:
        """transformers and torch make the activations."""
        return {**super().versions(dtypes), "torch": version("torch"), "transformers": version("transformers")}

    def prepare(self, skeleton: Skeleton, selection: Selection) -> None:
        """Observe keys, values and queries of every attention."""
        self._observer.install(skeleton.model)

    def calibrate(self, layer: Layer, forward: Callable[[], None], probe: Callable[[], Any]) -> Observed:
        """The running amax over all batches."""
        forward()
        return Observed(attention=self._observer.take(layer.module))

    def finish(self, layer: Layer, observed: Observed) -> dict[str, Any]:
        """The KV scales alone: weights need no data."""
        return {} if layer.attention is None else scale_tensors(layer.attention, observed, COMPRESSED_NAMES)


def requantize(
    weight: memoryview,
    dtype: str,
    rows: int,
    columns: int,
    stored: Mapping[str, tuple[str, bytes]],
    power: int,
    options: Mapping[str, Any],
) -> Requantized:
    """A weight quantized once more; see `pipeline.formats.base.Requantize`. Scales are made from the weight itself.

    Raises:
        NonFiniteWeight: it holds NaN or Inf.
    """
    values, scales = bytearray(rows * columns), bytearray(rows * DTYPE_BYTES[dtype])
    row_quantizer(dtype)(weight, values, scales, rows, columns)
    return Requantized({"weight": bytes(values), "weight_scale": bytes(scales)})
