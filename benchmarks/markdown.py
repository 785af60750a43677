"""Pieces of a markdown page: tables, and numbers in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.goals import MIB

NONE = "*Not measured yet.*"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, first column left, the others right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, marks, *rows])


def number(value: float) -> str:
    """Two decimals below 10, one below 100, none above."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.{1 if abs(value) < 100 else 0}f}"


def spread(values: Mapping[str, float], factor: float = 1.0) -> str:
    """Median with quartiles."""
    median, q1, q3 = (number(values[key] * factor) for key in ("median", "q1", "q3"))
    return f"{median} ({q1}–{q3})"


def mib(count: float) -> str:
    """Bytes in MiB."""
    return f"{count / MIB:,.2f}" if count < 10 * MIB else f"{count / MIB:,.0f}"
