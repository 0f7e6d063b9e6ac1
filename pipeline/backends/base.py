"""What a backend is: answers about a scheme, never a file and never a loop over layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.backends.fp8 import Buffer
from pipeline.errors import PipelineError
from pipeline.formats.base import Format, Output
from pipeline.formats.kv_scales import cache_scale
from pipeline.model.selection import Selection

if TYPE_CHECKING:
    from pipeline.checkpoint.source import Checkpoint
    from pipeline.model.skeleton import Layer, Skeleton


class Backend(Protocol):
    """A quantization scheme: what weights become, what the config says of it, how it is described.

    Attributes:
        name: the recipe's ``backend``.
        format: how its modules lie in a file.
        needs_data: whether every decoder layer has to run before it is written.
        weights_need_data: whether that holds of the weights, too, and not of KV scales alone.
        tags: for the model card.
        card: sentences for the model card about weights and activations.
        expert_rule: where the scales of an expert come from that no token reached; a sentence.
        import_seconds: what importing its libraries takes beyond torch and transformers, on a machine like
            the one of docs/benchmarks.md; for estimates.
        forward_cost: of a forward with its observers, over one in which every linear layer is observed.
    """

    name: str
    format: Format
    needs_data: bool
    weights_need_data: bool
    tags: tuple[str, ...]
    expert_rule: str
    import_seconds: float
    forward_cost: float

    @property
    def card(self) -> str:
        """See the class."""

    def attention_outputs(self) -> tuple[Output, ...]:
        """What every attention layer gets besides, by suffix after the attention's prefix; empty without KV scales."""

    def config_section(self, selection: Selection) -> dict[str, Any]:
        """The ``quantization_config`` of the result's config.json."""

    def extra_files(self, checkpoint: Checkpoint, selection: Selection) -> dict[str, Any]:
        """JSON files that the scheme has besides, by name; config.json itself, where it is not the source's."""

    def versions(self, dtypes: set[str]) -> dict[str, str]:
        """The libraries that decide the bits of weights of these dtypes, for a run's identity."""

    def imports_torch(self, dtypes: set[str]) -> bool:
        """Whether quantizing weights of these dtypes imports torch, which takes memory."""

    def load_libraries(self) -> None:
        """Import what the scheme needs beyond torch and transformers."""


class DataFreeBackend(Backend, Protocol):
    """A scheme whose weights need no data: values and one scale per row, from the rows alone.

    Its format is per-channel and has no static inputs. Rows come in pieces, so a row's result may not depend on others.
    """

    def quantizer(self, dtype: str) -> Callable[[Buffer, Buffer, Buffer, int, int], None]:
        """``f(source, values, scales, rows, columns)``, safe to call from several threads at once.

        It reads ``rows x columns`` values of `dtype`; it writes as many values of the format's `weight_dtype`, and one
        scale per row in the dtype that the format gives scales. Raises `NonFiniteWeight`.
        """


class CalibratedBackend(Backend, Protocol):
    """A scheme that sees every decoder layer run before it says what the layer becomes."""

    def prepare(self, skeleton: Skeleton, selection: Selection) -> None:
        """Put observers into a model without weights."""

    def calibrate(self, layer: Layer, forward: Callable[[], None], probe: Callable[[], Any]) -> Observed:
        """Collect the amax of a loaded layer.

        Args:
            layer: loaded; what it computes must not change by a bit.
            forward: runs every batch through it once.
            probe: runs one batch and returns what the layer makes of it, leaving the hidden states as they are.
        """

    def finish(self, layer: Layer, observed: Observed) -> dict[str, Any]:
        """What the layer becomes.

        Returns:
            By output tensor name, torch tensors on the CPU; source tensors that stay as they are may be left out.

        Raises:
            CalibrationError: a scale is not finite and positive.
        """


@dataclass
class Observed:
    """What was seen of one layer, for the report.

    Attributes:
        attention: largest magnitude of keys, values and queries: ``k``, ``v``, ``q``.
        tokens_of_experts: for each block of experts, how many tokens each was given.
        balanced: what was scaled by a power of two: (modules, modules against it, exponent).
        notes: sentences about this layer that a careful user should read.
    """

    attention: dict[str, float] = field(default_factory=dict)
    tokens_of_experts: dict[str, list[int]] = field(default_factory=dict)
    balanced: list[tuple[str, str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data, as the journal and quantize/calibration.json hold it."""
        return {
            "attention": self.attention,
            "tokens_of_experts": self.tokens_of_experts,
            "balanced": [list(entry) for entry in self.balanced],
            "notes": self.notes,
        }


class CalibrationError(PipelineError):
    """What was observed of a layer gives no usable scale."""


def cache_scales(attention: str, observed: Observed) -> dict[str, float]:
    """The scales of keys, values and queries of an attention layer, under ``k``, ``v`` and ``q``.

    What is zero throughout has any scale; it gets 1.0, and a note.

    Raises:
        CalibrationError: an amax is missing or not finite.
    """
    scales = {}
    for key, word in (("k", "keys"), ("v", "values"), ("q", "queries")):
        amax = observed.attention.get(key, math.nan)
        if not math.isfinite(amax):
            raise CalibrationError(
                f"{attention}: the {word} reach {amax}, which gives no scale for the KV cache",
                remedy="is the checkpoint damaged? Set kv_cache: none to leave it in BF16",
            )
        if amax == 0:
            observed.notes.append(f"{attention}: the {word} are zero throughout; their scale is 1.0")
        scales[key] = cache_scale(amax) if amax else 1.0
    return scales
