"""Sizes and times as text, and back."""

from __future__ import annotations

import re


def size_text(nbytes: float) -> str:
    """Decimal units, as drives and hubs count: ``3.86 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{int(nbytes)} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` (decimal) or ``512MiB`` (binary). Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if not match or unit is None:
        alone = re.fullmatch(r"\s*\d+(?:\.\d+)?\s*", text)
        likely = with_unit(float(text)) if alone else "5GB"
        raise ValueError(f"a size is a number and a unit: B, KB, MB, GB, TB, KiB, MiB or GiB, e.g. {likely}")
    try:
        size = int(float(match[1]) * unit)
    except OverflowError:
        raise ValueError("no disk is that large") from None
    if size < 10**6:
        raise ValueError("the smallest size here is 1MB")
    return size


def with_unit(number: float) -> str:
    """A size that was written without a unit, as it was probably meant: small numbers in GB, large ones in bytes."""
    if abs(number) < 10**6:
        return f"{number:.12g}GB"
    return f"{number / 10**9:.12g}GB" if number % 10**7 == 0 else f"{number:.0f}B"


def time_text(seconds: float) -> str:
    """Seconds, minutes or hours, as one would say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def duration_text(seconds: float) -> str:
    """A time as one reads it off a page: ``8.4 s``, ``52 s``, ``38 min``, ``7 h 42 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def error_text(estimate: float, taken: float) -> str:
    """How far an estimate was off, in words: ``12% longer than estimated``.

    Args:
        estimate: seconds that were expected.
        taken: seconds that it took.
    """
    off = round(100 * (taken / estimate - 1)) if estimate > 0 else 0
    return f"{abs(off)}% {'longer' if off > 0 else 'shorter'} than estimated" if off else "as estimated"
