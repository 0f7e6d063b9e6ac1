"""KV-cache scales: their names, their rounding, and when an amax looks wrong.

A scale is amax/448, the largest finite E4M3 value (OCP 8-bit Floating Point Specification, section 5.2). vLLM holds
scales in BF16: written as BF16 and rounded up, the amax itself still fits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from pipeline.formats.base import ScaleNames

E4M3_MAX = 448.0


_FOUR = {"k": "k_scale", "v": "v_scale", "q": "q_scale", "prob": "attn.prob_scale"}
_THREE = {key: name for key, name in _FOUR.items() if key != "prob"}

# ModelOpt's own k_proj.k_scale fails at load in vLLM 0.24.0 on Qwen2.5-VL; compressed-tensors refuses a prob_scale.
MODELOPT_NAMES = ScaleNames(_FOUR, (), seen=("0.24.0 on an H200", "0.32.0 on a CPU"))
COMPRESSED_NAMES = ScaleNames(_THREE, (1,), seen=("0.24.0 on an H200", "0.32.0 on a CPU"))
# ModelOpt's own export, for its exact mode
MODELOPT_OWN_NAMES = ScaleNames(
    {"k": "k_proj.k_scale", "v": "v_proj.v_scale"}, (), dtype="F32", seen=("0.32.0 on a CPU",)
)


def bf16_up(value: float) -> float:
    """The smallest BF16 number that is not below `value`, which is positive and in BF16's range."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    found: float = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    if found < value:
        found = struct.unpack("<f", struct.pack("<I", (bits & 0xFFFF0000) + 0x10000))[0]
    return found


def cache_scale(amax: float) -> float:
    """The scale of keys, values or queries whose largest magnitude is `amax`: amax/448 as BF16, rounded up."""
    return bf16_up(amax / E4M3_MAX)


PROB_SCALE = cache_scale(1.0)  # a probability is at most one


def usable(value: float) -> bool:
    """Whether an amax or a scale is finite and positive."""
    return math.isfinite(value) and value > 0


# E4M3 at scale 1.0 clips above 448, and 2**-6 is its smallest normal number.
LARGE, SMALL, STRANGE = E4M3_MAX, 2.0**-6, 32.0


def suspicious(ranges: Mapping[int, Mapping[str, float]]) -> list[str]:
    """What a careful user should know of the amax of keys and values, layer by layer.

    Args:
        ranges: layer index to largest magnitudes, under ``k`` and ``v``.
    """
    found = []
    for key, word in (("k", "keys"), ("v", "values")):
        seen = sorted(amax[key] for amax in ranges.values() if key in amax)
        if not seen:
            continue
        middle = seen[len(seen) // 2]
        for layer, amax in sorted(ranges.items()):
            if key not in amax:
                continue
            value, said = amax[key], []
            if value > LARGE:
                said.append("above 448: a server without the checkpoint's scales would clip them")
            if value < SMALL:
                said.append("below 2^-6: a server without the checkpoint's scales would lose them")
            if value > STRANGE * middle or value * STRANGE < middle:
                said.append(f"the median layer has {middle:.3g}")
            if said:
                found.append(f"layer {layer}: {word} reach {value:.4g}; {'; '.join(said)}")
    return found
