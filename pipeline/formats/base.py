"""How a quantized linear layer lies in a file: the one description that writing and verifying share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FP8 = "F8_E4M3"
TYPE_NAMES = {FP8: "FP8", "I8": "INT8"}  # for people


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a module becomes: what follows the module's name, dtype, and shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ScaleNames:
    """Tensor names, from the attention's prefix on (``model.layers.0.self_attn``), and a scale's shape.

    Attributes:
        names: for k, v, q and prob.
        shape: of each tensor.
        dtype: of each tensor; vLLM holds KV scales in BF16.
        seen: the vLLM versions that were seen to load these names, and how.
    """

    names: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: str = "BF16"
    seen: tuple[str, ...] = ()

    def outputs(self) -> tuple[Output, ...]:
        """The tensors, suffixes counted from the attention's prefix."""
        return tuple(Output(name, self.dtype, self.shape) for name in self.names.values())


def every_name(*known: ScaleNames) -> dict[str, tuple[str, ...]]:
    """All names of each scale, by its key (k, v, q, prob), in the order of `known`."""
    keys = dict.fromkeys(key for names in known for key in names.names)
    return {key: tuple(names.names[key] for names in known if key in names.names) for key in keys}


@dataclass(frozen=True)
class Format:
    """A layout of quantized weights, and the section of config.json that describes it.

    A new one is registered with `pipeline.formats.methods.register`.

    Attributes:
        name: the section's ``quant_method``, vLLM's word for it.
        weights: what a group of ``config_groups`` says of weights, as far as vLLM reads it.
        inputs: likewise of activations; empty: weights alone are quantized.
        static_inputs: whether every weight has an ``input_scale``.
        granularity: of the weight scale: ``channel`` (one per output row) or ``tensor``.
        cache: for k, v, q and prob every name that vLLM takes, from the attention's prefix on.
        weight_dtype: of the values that are stored for a weight, one byte each.
        scale_dtype: of scales; None: the source weight's own.
        column: whether per-channel scales are columns, [rows, 1], as compressed-tensors has them, or [rows].
        repeatable: whether the weights can be quantized once more here, to be compared bit by bit.
        repeatable_elsewhere: source dtypes for which that holds of third-party checkpoints, too; None: of all. Name
            none where others make their scales otherwise: a sound checkpoint of theirs would fail.
        section_format: what the section's own ``format`` must be; empty: not looked at.
        quant_algo: what the section's ``quant_algo`` must be; None: not looked at.
        groups_optional: whether vLLM does without ``config_groups``.
        ignore_globs: whether patterns of the section's ``ignore`` are globs; else ``re:`` with regular expressions.
        recognizes: whether a section describes this layout.
    """

    name: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]
    static_inputs: bool
    granularity: Literal["channel", "tensor"]
    recognizes: Callable[[Mapping[str, Any]], bool]
    cache: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weight_dtype: str = FP8
    scale_dtype: str | None = None
    column: bool = True
    repeatable: bool = True
    repeatable_elsewhere: frozenset[str] | None = None
    section_format: tuple[str, ...] = ()
    quant_algo: str | None = None
    groups_optional: bool = False
    ignore_globs: bool = False

    @property
    def weight_type(self) -> str:
        """`weight_dtype` in words: FP8, INT8."""
        return TYPE_NAMES.get(self.weight_dtype, self.weight_dtype)

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        """Of the scale of a weight with so many rows."""
        if self.granularity == "tensor":
            return ()
        return (rows, 1) if self.column else (rows,)

    def outputs(self, dtype: str, rows: int, columns: int) -> tuple[Output, ...]:
        """The tensors that a ``rows x columns`` weight of `dtype` becomes: its values, their scale, an input scale."""
        kind = self.scale_dtype or dtype
        values = Output("weight", self.weight_dtype, (rows, columns))
        made = (values, Output("weight_scale", kind, self.scale_shape(rows)))
        return (*made, Output("input_scale", kind, ())) if self.static_inputs else made

    def can_repeat(self, dtype: str, produced_here: bool) -> bool:
        """Whether a weight of this source dtype gives the same bits when it is quantized once more on this machine."""
        elsewhere = self.repeatable_elsewhere is None or dtype in self.repeatable_elsewhere
        return self.repeatable and (produced_here or elsewhere)


@dataclass(frozen=True)
class Requantized:
    """A weight, quantized once more with the scales that are stored; see `Requantize`.

    Attributes:
        tensors: by suffix, the bytes that the file should hold.
        unusable: the suffix of a stored tensor that is missing or cannot be right; None where all can be.
        reach: the weight's amax, and the largest magnitude that the stored scale can hold; None where scales are made
            from the weight itself.
    """

    tensors: Mapping[str, bytes]
    unusable: str | None = None
    reach: tuple[float, float] | None = None


class Requantize(Protocol):
    """A scheme's numerics once more, for verification."""

    def __call__(
        self,
        weight: memoryview,
        dtype: str,
        rows: int,
        columns: int,
        stored: Mapping[str, tuple[str, bytes]],
        power: int,
        options: Mapping[str, Any],
    ) -> Requantized:
        """What a file should hold for a weight.

        Args:
            weight: the source's, row by row.
            dtype: of `weight`: BF16, F16 or F32.
            rows: output features.
            columns: input features.
            stored: the module's tensors in the file that is verified, as (dtype, bytes) by suffix; what is lost there
                is missing here.
            power: the rows were scaled by 2^power before they were quantized (cross-layer equalization).
            options: the run's ``backend_options``; empty for a third-party checkpoint.

        Raises:
            NonFiniteWeight: the weight holds NaN or Inf.
        """
