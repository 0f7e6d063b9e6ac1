"""Names and places of a result's files: what runs write, and what verification, reports and batches read.

Paths are relative to the checkpoint's directory.
"""

from __future__ import annotations

from pathlib import Path

RECORDS = "quantize"  # everything about the run, beside the weights
JOURNAL = "quantize/journal.jsonl"
LOCK = "quantize/lock"
EVENTS = "quantize/events.jsonl"
FILES = "quantize/files.json"  # SHA-256 of the small files, by name
RECIPE = "quantize/recipe.yaml"
VERSIONS = "quantize/versions.json"
LAYERS = "quantize/layers.json"
CALIBRATION = "quantize/calibration.json"
VERDICT = "quantize/verify.json"
PROFILE = "quantize/serve.yaml"
CARD = "README.md"  # the model card


def places(output: str) -> tuple[Path, Path]:
    """Where a recipe's `output` will be published, and where it is made until then."""
    published = Path(output).expanduser().absolute()
    return published, published.with_name(published.name + ".partial")
