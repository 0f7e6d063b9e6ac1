"""The schemes that there are: which backend carries out a recipe, and which numerics a format has.

A new scheme registers itself here, beside its file in backends/, its format and its word in the recipe; nobody else
asks for a scheme by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.backends import llmcompressor, modelopt
from pipeline.backends.base import Backend
from pipeline.backends.llmcompressor import FP8Dynamic, FP8DynamicKV
from pipeline.backends.modelopt import ModelOptFP8
from pipeline.formats.base import Format, Requantize
from pipeline.formats.methods import COMPRESSED, MODELOPT
from pipeline.recipe.recipe import Recipe


@dataclass(frozen=True)
class Scheme:
    """One entry.

    Attributes:
        backend: the recipe's word.
        scheme: the recipe's word.
        make: the backend for a recipe.
        format: how its results lie in a file.
        requantize: its numerics once more, for verification.
        numerics: whose they are, for messages.
    """

    backend: str
    scheme: str
    make: Callable[[Recipe], Backend]
    format: Format
    requantize: Requantize
    numerics: str


def _modelopt(recipe: Recipe) -> Backend:
    options: Any = recipe.backend_options
    return ModelOptFP8(recipe.kv_cache == "fp8", options.exact, options.balance)


def _fp8_dynamic(recipe: Recipe) -> Backend:
    return FP8DynamicKV() if recipe.kv_cache == "fp8" else FP8Dynamic()


_schemes: dict[tuple[str, str], Scheme] = {}


def register(scheme: Scheme) -> None:
    """Add a scheme; the recipe must know its words, see `pipeline.recipe.recipe.register`."""
    _schemes[scheme.backend, scheme.scheme] = scheme


def unregister(scheme: Scheme) -> None:
    """Take `register` back."""
    del _schemes[scheme.backend, scheme.scheme]


register(Scheme("modelopt", "fp8", _modelopt, MODELOPT, modelopt.requantize, ModelOptFP8.numerics))
register(
    Scheme("llmcompressor", "fp8_dynamic", _fp8_dynamic, COMPRESSED, llmcompressor.requantize, FP8Dynamic.numerics)
)


def choose_backend(recipe: Recipe) -> Backend:
    """The backend that carries out a recipe's scheme."""
    return _schemes[recipe.backend, recipe.scheme].make(recipe)


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe needs forward passes, and with them torch and captions."""
    scheme = _schemes.get((recipe.backend, recipe.scheme))
    return scheme is None or scheme.make(recipe).needs_data


def of_identity(identity: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a run of this tool, by its identity in the journal; None for one that is not known (any more)."""
    return _schemes.get((str(identity.get("backend")), str(identity.get("scheme"))))


def of_format(found: Format) -> Scheme | None:
    """The scheme whose results have this format; None where nothing here makes it."""
    return next((scheme for scheme in _schemes.values() if scheme.format is found), None)
