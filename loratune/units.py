"""Numbers as text: bytes, seconds, counts and shares, written and read."""

from __future__ import annotations

import math
import re

NOTHING = "–"
"""What stands where there is no number."""

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", "k", "M", "G", "T")
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_BYTES = {"": 1} | {unit.upper(): 1000**power for power, unit in enumerate(_BYTE_UNITS)}
_BYTES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def significant(value: float | None, digits: int = 4) -> str:
    """``value`` to a few significant digits: 4.253, 0.01134, 2.8e-07; a dash for nothing."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and 1000 <= abs(value) < 1e15):
        return f"{int(value):,}"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e7):
        return f"{value:.{max(digits - 2, 2)}g}"
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share between 0 and 1 as a percentage."""
    return NOTHING if share is None else f"{share:.1%}"


def filled(tokens_per_computed: float) -> str:
    """Tokens of rows over tokens computed: "96% filled", or "2.07 × shared" above 1."""
    if tokens_per_computed > 1:
        return f"{tokens_per_computed:.3g} × shared"
    return f"{tokens_per_computed:.0%} filled"


def byte_size(count: float | None, digits: int = 3) -> str:
    """Bytes with a decimal unit: 295 kB is 295,000 bytes."""
    return NOTHING if count is None else _scaled(count, _BYTE_UNITS, " ", digits)


def short_count(count: float, digits: int = 3) -> str:
    """A count with a unit: 74k."""
    return _scaled(count, _COUNT_UNITS, "", digits)


def _scaled(value: float, units: tuple[str, ...], gap: str, digits: int) -> str:
    place = 0
    while abs(value) >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.{digits}g}{gap if units[place] else ''}{units[place]}"


def duration(seconds: float | None, digits: int = 3) -> str:
    """Seconds as 13.6 s, 4 min 10 s or 2 h 5 min, rounded to a few digits."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    seconds = float(f"{seconds:.{digits}g}")
    if seconds < 120:
        return f"{seconds:g} s"
    large, small, unit, part = seconds // 60, round(seconds % 60), "min", "s"
    if large >= 120:
        minutes = round(seconds / 60)
        large, small, unit, part = minutes // 60, minutes % 60, "h", "min"
    return f"{large:.0f} {unit}" + (f" {small} {part}" if small else "")


def clock(seconds: float) -> str:
    """Seconds as a clock shows them: 0:05 or 1:02:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def parse_bytes(text: str) -> int | None:
    """``24GB``, ``1.5 GiB`` or plain bytes; ``None`` if it is not a size."""
    return _parsed(text, _BYTES)


def parse_count(text: str) -> int | None:
    """``20M``, ``9.2M``, ``589,824`` or a plain number; ``None`` if it is not a count."""
    return _parsed(text, _COUNTS)


def _parsed(text: str, units: dict[str, int]) -> int | None:
    parts = re.fullmatch(r"([\d_,]*\.?\d+)\s*([A-Za-z]*)", text.strip())
    if parts is None or parts[2].upper() not in units:
        return None
    return round(float(re.sub("[_,]", "", parts[1])) * units[parts[2].upper()])
