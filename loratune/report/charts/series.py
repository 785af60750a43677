"""What a chart draws: points with their ranges, each series with a look of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from xml.etree.ElementTree import Element

from loratune.report.charts.svg import add

LOOKS = 6
"""Colours in the style sheet, each with its own dash and marker."""

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2", "12 4")
_BUCKETS = 60


@dataclass(frozen=True)
class Point:
    """A value and, where there is one, the range around it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: for the legend.
        points: in drawing order.
        look: number of its colour, dash and marker.
        line: whether the points are joined.
        markers: whether each point gets its marker.
    """

    name: str
    points: tuple[Point, ...]
    look: int = 0
    line: bool = True
    markers: bool = False

    @property
    def style(self) -> str:
        """Class of its colour."""
        return f"s{self.look % LOOKS}"

    @property
    def dash(self) -> str:
        """Dash pattern of its line."""
        return _DASHES[self.look % LOOKS]


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
        middle = fmean(x for x, _ in part)
        points.append(Point(middle, fmean(values), min(values), max(values)))
    return tuple(points)


def marker(parent: Element, look: int, x: float, y: float, size: float = 4.5) -> Element:
    """The marker of a look: disc, square, triangle, diamond, cross or downward triangle."""
    style, kind = f"s{look % LOOKS} mark", look % LOOKS
    if kind == 0:
        return add(parent, "circle", cx=x, cy=y, r=size, class_=style)
    shapes = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
        3: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        4: (
            (-1.2, -0.4),
            (-0.4, -0.4),
            (-0.4, -1.2),
            (0.4, -1.2),
            (0.4, -0.4),
            (1.2, -0.4),
            (1.2, 0.4),
            (0.4, 0.4),
            (0.4, 1.2),
            (-0.4, 1.2),
            (-0.4, 0.4),
            (-1.2, 0.4),
        ),
        5: ((0, 1.25), (1.15, -0.9), (-1.15, -0.9)),
    }
    corners = " ".join(f"{x + a * size:.2f},{y + b * size:.2f}" for a, b in shapes[kind])
    return add(parent, "polygon", points=corners, class_=style)
