"""The schemes that there are: which backend carries out a recipe, and which numerics a format has.

Nobody else asks for a scheme by name. A new one needs, and tests/test_toy_scheme.py has all of it in one file:

1. a backend (`pipeline.backends.base`) and a function that quantizes once more (`pipeline.formats.base.Requantize`);
2. a format, `pipeline.formats.methods.register`, unless it shares one;
3. a recipe, `pipeline.recipe.recipe.register`;
4. an entry here, `register`.
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
        numerics: whose they are, for messages: ``ModelOpt's``.
        repeats: whether a CPU gives the bits of a run again, by the run's identity.
    """

    backend: str
    scheme: str
    make: Callable[[Recipe], Backend]
    format: Format
    requantize: Requantize
    numerics: str
    repeats: Callable[[Mapping[str, Any]], bool] = lambda identity: True


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


register(Scheme("modelopt", "fp8", _modelopt, MODELOPT, modelopt.requantize, "ModelOpt's", modelopt.repeats))
register(Scheme("llmcompressor", "fp8_dynamic", _fp8_dynamic, COMPRESSED, llmcompressor.requantize, "llm-compressor's"))


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


def of_result(found: Format, identity: Mapping[str, Any] | None) -> Scheme | None:
    """The scheme whose numerics a checkpoint of this format should have.

    Args:
        found: how the checkpoint describes itself.
        identity: of the run that made it; None for a third-party checkpoint.

    Returns:
        The run's own scheme, else the first one with this format; None where nothing here makes it.
    """
    own = of_identity(identity) if identity is not None else None
    known = [own] if own is not None else []
    return next((scheme for scheme in (*known, *_schemes.values()) if scheme.format is found), None)
