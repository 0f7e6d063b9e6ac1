"""Offline FP8 quantization of Hugging Face checkpoints: streamed, resumable, checked for vLLM."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fp8-pipeline")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"
