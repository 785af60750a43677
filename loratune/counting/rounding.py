"""Whether a printed number is the exact one, rounded, cut off, or wrong."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from math import floor

UNITS = {"": 1, "%": 1, "K": 10**3, "M": 10**6, "KiB": 1 << 10, "MiB": 1 << 20}
"""What one printed unit stands for."""


class Verdict(StrEnum):
    """How a printed number relates to the exact one."""

    right = "right"
    rounded = "rounded"
    truncated = "truncated"
    wrong = "wrong"
    not_reproducible = "not reproducible"


def judge(printed: str, unit: str, exact: Fraction) -> Verdict:
    """Compare a printed decimal number with the exact value, at the printed precision.

    A tie may be rounded up or to the even digit: both are in use.
    """
    decimal = Decimal(printed.replace(",", ""))
    exponent = decimal.as_tuple().exponent
    assert isinstance(exponent, int)
    in_last_digits = Fraction(exact) / UNITS[unit] * Fraction(10) ** -exponent
    shown = Fraction(decimal) * Fraction(10) ** -exponent
    if shown == in_last_digits:
        return Verdict.right
    if shown in (round(in_last_digits), floor(in_last_digits + Fraction(1, 2))):
        return Verdict.rounded
    return Verdict.truncated if shown == floor(in_last_digits) else Verdict.wrong


def in_unit(printed: str, unit: str, exact: Fraction) -> str:
    """The exact value in the printed unit, with two digits more than were printed."""
    value = Fraction(exact) / UNITS[unit]
    if value.denominator == 1:
        return f"{value.numerator:,}"
    digits = len(printed.partition(".")[2]) + 2
    return f"{float(value):,.{digits}f}"
