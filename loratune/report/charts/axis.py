"""Scales of a chart: where a value lies and which ticks it gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from loratune.units import byte_size, duration, short_count

_MOST_LOG_TICKS = 7
_LARGEST = 1e300
"""Values beyond it lie at the border, and those nearer to zero than its inverse at zero: with
them, differences and powers would leave the range of floats."""
_FLAT = 1e-9
"""Values whose spread is a smaller share of them are one value and its rounding."""


@dataclass(frozen=True)
class Axis:
    """One scale.

    Attributes:
        label: quantity and unit.
        low: value at its start.
        high: value at its end.
        log: whether it is logarithmic.
        ticks: values with a gridline.
        show: a tick's text.
    """

    label: str
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    show: Callable[[float], str]

    def place(self, value: float) -> float:
        """Share of the way from low to high; outside values stay at the border."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            value = math.log(max(value, 1 / _LARGEST))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def make_axis(
    label: str,
    values: Sequence[float],
    *,
    log: bool | None = None,
    unit: str = "",
    from_zero: bool = False,
    padding: float = 0.0,
) -> Axis:
    """A scale that shows every finite value.

    Args:
        label: quantity and unit.
        values: what will be drawn.
        log: whether it is logarithmic; ``None`` decides by the values' spread.
        unit: ``bytes``, ``seconds`` or ``count`` for short ticks.
        from_zero: whether a linear scale starts at zero.
        padding: share of the spread to leave free on either side of a linear scale.
    """
    finite = [_within(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log is None:
        log = low > 0 and high / 30 >= low
    log = log and low > 0
    if log:
        return _log_axis(label, low, high, unit)
    if from_zero:
        low = min(low, 0.0)
    if high - low <= _FLAT * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    else:
        low, high = low - padding * (high - low), high + padding * (high - low)
    step = _nice_step((high - low) / 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))
    return Axis(label, ticks[0], ticks[-1], False, ticks, _shower(unit, ticks))


def _within(value: float) -> float:
    if abs(value) < 1 / _LARGEST:
        return 0.0
    return min(_LARGEST, max(-_LARGEST, value))


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)


def _log_axis(label: str, low: float, high: float, unit: str) -> Axis:
    low, high = low / 1.15, high * 1.15
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**n for n in range(first, last + 1) for f in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _MOST_LOG_TICKS:
            break
    stride = math.ceil(len(ticks) / _MOST_LOG_TICKS)
    chosen = tuple(ticks[::stride]) if len(ticks) > 1 else (low * 1.15, high / 1.15)
    if chosen[0] == chosen[-1]:
        chosen = chosen[:1]
    return Axis(f"{label}, log scale", low, high, True, chosen, _shower(unit, chosen))


def _shower(unit: str, ticks: Sequence[float]) -> Callable[[float], str]:
    """How ticks are written: as short as tells them all apart."""
    for digits in range(3, 12):
        show = partial(_SHOWN.get(unit, _plain), digits=digits)
        if len({show(tick) for tick in ticks}) == len(ticks):
            break
    return show


def _plain(value: float, digits: int) -> str:
    if abs(value) >= 10_000:
        return short_count(value, digits)
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


_SHOWN: dict[str, Callable[..., str]] = {
    "bytes": byte_size,
    "count": short_count,
    "seconds": duration,
}
