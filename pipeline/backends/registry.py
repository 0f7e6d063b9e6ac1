"""Which backend carries out a recipe's scheme."""

from __future__ import annotations

from pipeline.backends.base import Backend
from pipeline.backends.llmcompressor import FP8Dynamic, FP8DynamicKV
from pipeline.backends.modelopt import ModelOptFP8
from pipeline.recipe.recipe import Recipe


def choose_backend(recipe: Recipe) -> Backend:
    """The backend that carries out a recipe's scheme."""
    if recipe.backend == "modelopt":
        options = recipe.backend_options
        return ModelOptFP8(recipe.kv_cache == "fp8", options.exact, options.balance)
    return FP8DynamicKV() if recipe.kv_cache == "fp8" else FP8Dynamic()
