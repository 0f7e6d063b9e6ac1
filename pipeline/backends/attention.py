"""What KV scales are made from: the amax of keys, values and queries as attention sees them, after rotary embedding."""

from __future__ import annotations

from typing import Any

from pipeline.backends.base import Observed, cache_scales
from pipeline.formats.base import ScaleNames
from pipeline.formats.kv_scales import PROB_SCALE

NAME = "pipeline_ranges"  # of the attention function, in transformers' registry


class AttentionObserver:
    """Collects the running amax of every attention of a model, and hands on to transformers' sdpa unchanged."""

    def __init__(self) -> None:
        self._seen: dict[Any, list[Any]] = {}  # attention module to amax of keys, values and queries so far

    def install(self, model: Any) -> None:
        """Register an attention function that looks at keys, values and queries; `model` uses it from now on."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def looking(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            found = [states.detach().abs().amax() for states in (key, value, query)]
            before = self._seen.get(module)
            # torch.maximum hands NaN on, so that it is found
            self._seen[module] = found if before is None else [torch.maximum(a, b) for a, b in zip(before, found)]
            return inner(module, query, key, value, *args, **kwargs)

        AttentionInterface.register(NAME, looking)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(NAME)

    def take(self, layer: Any) -> dict[str, float]:
        """The amax that was seen in a decoder layer's attention, under ``k``, ``v`` and ``q``; it is forgotten here."""
        found: dict[str, float] = {}
        for module in layer.modules():
            if module in self._seen:
                values = [float(value.item()) for value in self._seen.pop(module)]
                found = dict(zip("kvq", values, strict=True))
        return found


def scale_tensors(attention: str, observed: Observed, names: ScaleNames) -> dict[str, Any]:
    """The KV scales of an attention layer as torch tensors, by output tensor name.

    Args:
        attention: the prefix of its tensor names.
        observed: with the amax of keys, values and queries.
        names: which scales there are, their names, shape and dtype (BF16).

    Raises:
        CalibrationError: an amax is missing or not finite.
    """
    import torch

    scales = {**cache_scales(attention, observed), "prob": PROB_SCALE}
    return {
        f"{attention}.{name}": torch.full(names.shape, scales[key], dtype=torch.bfloat16)
        for key, name in names.names.items()
    }
