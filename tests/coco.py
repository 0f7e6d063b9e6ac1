"""Annotations as COCO has them, and what is loaded and built of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from calib_data.__main__ import main as builder
from pipeline.calibration.captions import CaptionSet, load_captions
from pipeline.errors import UsageError
from pipeline.recipe.sections import Calibration

ROWS = [{"image_id": image, "id": 5 * image + n, "caption": f"Caption {n} of image {image}."}
        for image in range(20) for n in range(5)]  # fmt: skip
COCO_INFO = {"description": "COCO 2017 Dataset", "contributor": "COCO Consortium"}


def coco(path: Path, rows: list[dict[str, Any]] = ROWS, info: dict[str, str] = COCO_INFO) -> Path:
    path.write_text(json.dumps({"info": info, "licenses": [], "images": [], "annotations": rows}))
    return path


def load(captions: Path | str, samples: int = 10, **more: Any) -> CaptionSet:
    return load_captions(Calibration(captions=str(captions), samples=samples, **more))


def error(captions: Path | str, samples: int = 1, **more: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load(captions, samples, **more)
    assert caught.value.exit_status == 2
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text


def build(*arguments: object) -> Result:
    return CliRunner().invoke(builder, [str(argument) for argument in arguments])
