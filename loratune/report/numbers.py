"""Numbers as people read them, and the interval of a share."""

from __future__ import annotations

import math

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
_COUNT_UNITS = ("", "k", "M", "G", "T")


def significant(value: float | None, digits: int = 4) -> str:
    """``value`` to a few significant digits: 4.253, 0.01134, 2.8e-07; a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, int) or (value == int(value) and 1000 <= abs(value) < 1e15):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-4 or abs(value) >= 1e7):
        return f"{value:.{max(digits - 2, 2)}g}"
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share between 0 and 1 as a percentage."""
    return "–" if share is None else f"{share:.1%}"


def byte_size(count: float | None, digits: int = 3) -> str:
    """Bytes with a decimal unit: 295 kB is 295,000 bytes."""
    return "–" if count is None else _scaled(count, _BYTE_UNITS, " ", digits)


def short_count(count: float, digits: int = 3) -> str:
    """A count with a unit: 74k."""
    return _scaled(count, _COUNT_UNITS, "", digits)


def _scaled(value: float, units: tuple[str, ...], gap: str, digits: int) -> str:
    place = 0
    while abs(value) >= 999.5 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.{digits}g}{gap if units[place] else ''}{units[place]}"


def duration(seconds: float | None) -> str:
    """Seconds as 13.6 s, 4 min 10 s or 2 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def share_interval(hits: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), sound for 0 and all of few trials."""
    z = 1.959964
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = share * (1 - share) / trials + z * z / (4 * trials * trials)
    half = z * math.sqrt(spread) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)
