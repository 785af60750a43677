"""Differences with their confidence intervals, one below the other, around a line at zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratune.report.charts.axis import make_axis
from loratune.report.charts.chart_frame import WIDTH, Chart
from loratune.report.charts.series import marker
from loratune.report.charts.svg import add, canvas, clean, shorten, text_width, to_markup
from loratune.tables import Table
from loratune.units import significant

_ROW = 46.0
_LEFT, _RIGHT, _TOP = 20.0, WIDTH - 20.0, 10.0


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds; ``certain`` where a test tells it from zero."""

    name: str
    value: float
    low: float
    high: float
    certain: bool
    verdict: str = ""


def interval_chart(
    title: str, across: str, intervals: Sequence[Interval], *, note: str = ""
) -> Chart | None:
    """A row an interval; those not told from zero are drawn hollow.  ``None`` for no intervals."""
    if not intervals:
        return None
    values = [v for one in intervals for v in (one.low, one.high, 0.0)]
    axis = make_axis(across, values, log=False)
    bottom = _TOP + len(intervals) * _ROW
    spoken = "; ".join(f"{one.name}: {_text(one)}" for one in intervals)
    root = canvas(WIDTH, bottom + 46, f"{title}. {spoken}.")

    def x(value: float) -> float:
        return _LEFT + axis.place(value) * (_RIGHT - _LEFT)

    grid = add(root, "g", class_="grid")
    for tick in axis.ticks:
        text = axis.show(tick)
        half = text_width(text) / 2
        middle = min(max(x(tick), half), WIDTH - half)
        add(grid, "line", x1=x(tick), x2=x(tick), y1=_TOP, y2=bottom)
        add(root, "text", text, x=middle, y=bottom + 20, text_anchor="middle")
    add(root, "line", class_="axis", x1=x(0), x2=x(0), y1=_TOP, y2=bottom)
    add(root, "text", axis.label, x=WIDTH / 2, y=bottom + 39, class_="label", text_anchor="middle")
    for number, one in enumerate(intervals):
        y = _TOP + number * _ROW + 34
        look = 0 if one.certain else 1
        group = add(root, "g", class_="point" if one.certain else "point open")
        add(group, "title", f"{one.name}\n{_text(one)}\n{one.verdict}".rstrip())
        add(root, "text", shorten(clean(one.name), 58), x=_LEFT, y=y - 16, class_="name")
        add(
            group, "line", x1=x(one.low), x2=x(one.high), y1=y, y2=y, class_=f"s{look} stroke thick"
        )
        for end in (one.low, one.high):
            add(group, "line", x1=x(end), x2=x(end), y1=y - 5, y2=y + 5, class_=f"s{look} stroke")
        marker(group, look, x(one.value), y, 5)
    rows = tuple((one.name, significant(one.value), _bounds(one), one.verdict) for one in intervals)
    columns = ("compared", "difference", "interval", "verdict")
    return Chart(title, to_markup(root), Table(f"values of {title}", columns, rows), note)


def _bounds(one: Interval) -> str:
    return f"{significant(one.low)} to {significant(one.high)}"


def _text(one: Interval) -> str:
    return f"{significant(one.value)}, interval {_bounds(one)}"
