"""KV scales: rounded up in BF16, named as vLLM takes them, and said to be strange when they are."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats.kv_scales import (
    COMPRESSED_NAMES,
    E4M3_MAX,
    MODELOPT_NAMES,
    MODELOPT_OWN_NAMES,
    PROB_SCALE,
    bf16_up,
    cache_scale,
    suspicious,
    usable,
)


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def is_bf16(value: float) -> bool:
    return struct.unpack("<f", struct.pack("<f", value))[0] == value and bits(value) & 0xFFFF == 0


@given(st.floats(min_value=2.0**-100, max_value=2.0**100))
def test_the_smallest_bf16_not_below(value: float) -> None:
    up = bf16_up(value)
    assert is_bf16(up) and up >= value
    below = struct.unpack("<f", struct.pack("<I", bits(up) - 0x10000))[0]
    assert below < value


@given(st.integers(min_value=0x2000, max_value=0x6000))
def test_every_amax_fits_under_its_scale(pattern: int) -> None:
    amax = struct.unpack("<f", struct.pack("<I", pattern << 16))[0]
    scale = cache_scale(amax)
    assert is_bf16(scale)
    assert amax / scale <= E4M3_MAX
    assert scale <= amax / E4M3_MAX * (1 + 2.0**-7)


def test_values_between_float32_and_double() -> None:
    """Just above a BF16 number in double precision, equal to it in float32: still rounded up."""
    value = 1.0 + 2.0**-40
    assert bf16_up(value) >= value


def test_prob_scale_and_names() -> None:
    assert PROB_SCALE == 0.0022430419921875 and PROB_SCALE * E4M3_MAX >= 1.0
    assert MODELOPT_NAMES.names == {
        "k": "k_scale", "v": "v_scale", "q": "q_scale", "prob": "attn.prob_scale",
    }  # fmt: skip
    assert "prob" not in COMPRESSED_NAMES.names  # vLLM raises on it there
    assert all(names.seen for names in (MODELOPT_NAMES, COMPRESSED_NAMES, MODELOPT_OWN_NAMES))


@pytest.mark.parametrize(
    ("value", "good"), [(1.0, True), (0.0, False), (-1.0, False), (math.nan, False), (math.inf, False)]
)
def test_usable(value: float, good: bool) -> None:
    assert usable(value) is good


def test_strange_ranges_are_named_by_layer() -> None:
    ranges = {layer: {"k": 8.0, "v": 2.0} for layer in range(9)}
    assert suspicious(ranges) == []
    ranges[3] = {"k": 1000.0, "v": 2.0}
    ranges[5] = {"k": 8.0, "v": 0.001}
    found = suspicious(ranges)
    assert len(found) == 2
    assert found[0].startswith("layer 3: keys reach 1000; above 448") and "the median layer has 8" in found[0]
    assert found[1].startswith("layer 5: values reach 0.001; below 2^-6")
