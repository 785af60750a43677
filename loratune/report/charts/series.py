"""What a chart draws: points with their ranges, each series with a look of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree.ElementTree import Element

from loratune.report.charts.svg import add
from loratune.training.history import mean
from loratune.units import significant

LOOKS = 6
"""Colours in the style sheet, each with its own dash and marker."""

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2", "12 4")
_BUCKETS = 60
_CROSS = tuple(
    zip(
        (-1.2, -0.4, -0.4, 0.4, 0.4, 1.2, 1.2, 0.4, 0.4, -0.4, -0.4, -1.2),
        (-0.4, -0.4, -1.2, -1.2, -0.4, -0.4, 0.4, 0.4, 1.2, 1.2, 0.4, 0.4),
        strict=True,
    )
)


@dataclass(frozen=True)
class Point:
    """A value and, where there is one, the range around it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    text: str = ""

    @property
    def range(self) -> tuple[float, float] | None:
        """Both ends of the range, where there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def range_text(self) -> str:
        """The range in words; empty where there is none."""
        return "" if self.range is None else " to ".join(map(significant, self.range))


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: for the legend.
        points: in drawing order.
        look: number of its colour, dash and marker.
        line: whether the points are joined.
        markers: whether each point gets its marker.
        failed: place across of what was tried and has no value, and why.
    """

    name: str
    points: tuple[Point, ...]
    look: int = 0
    line: bool = True
    markers: bool = False
    failed: Mapping[float, str] = field(default_factory=dict)

    @property
    def style(self) -> str:
        """Class of its colour."""
        return f"s{self.look % LOOKS}"

    @property
    def dash(self) -> str:
        """Dash pattern of its line."""
        return _DASHES[_shape(self.look)]


def _shape(look: int) -> int:
    """Number of dash and marker: a colour that comes again gets others."""
    return (look + look // LOOKS) % LOOKS


def single(name: str, point: Point, look: int) -> Series:
    """One marked point alone."""
    return Series(name, (point,), look, line=False, markers=True)


def condensed(pairs: Sequence[tuple[float, float]]) -> tuple[Point, ...]:
    """At most sixty points: each the mean of its stretch, with the stretch's range."""
    finite = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= _BUCKETS:
        return tuple(Point(x, y) for x, y in finite)
    points = []
    for number in range(_BUCKETS):
        start = number * len(finite) // _BUCKETS
        part = finite[start : (number + 1) * len(finite) // _BUCKETS]
        values = [y for _, y in part]
        middle = mean([x for x, _ in part])
        points.append(Point(middle, mean(values), min(values), max(values)))
    return tuple(points)


def marker(parent: Element, look: int, x: float, y: float, size: float = 4.5) -> Element:
    """The marker of a look: disc, square, triangle, diamond, cross or downward triangle."""
    style, kind = f"s{look % LOOKS} mark", _shape(look)
    if kind == 0:
        return add(parent, "circle", cx=x, cy=y, r=size, class_=style)
    shapes = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
        3: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        4: _CROSS,
        5: ((0, 1.25), (1.15, -0.9), (-1.15, -0.9)),
    }
    corners = " ".join(f"{x + a * size:.2f},{y + b * size:.2f}" for a, b in shapes[kind])
    return add(parent, "polygon", points=corners, class_=style)


def failure_mark(parent: Element, series: Series, x: float, y: float) -> Element:
    """A cross in the series' colour, where something was tried and has no value."""
    group = add(parent, "g", class_=f"{series.style} stroke failed")
    for rise in (-4, 4):
        add(group, "line", x1=x - 4, x2=x + 4, y1=y - rise, y2=y + rise)
    return group


def whisker(parent: Element, style: str, x: float, low: float, high: float) -> None:
    """An upright line with a bar at either end."""
    add(parent, "line", x1=x, x2=x, y1=low, y2=high, class_=f"{style} stroke")
    for y in (low, high):
        add(parent, "line", x1=x - 4, x2=x + 4, y1=y, y2=y, class_=f"{style} stroke")
