"""Quality against cost, with the points that nothing beats on both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from loratune.report.charts.axis import make_axis
from loratune.report.charts.chart_frame import Chart, Frame, drawn
from loratune.report.charts.series import Point, Series, marker, whisker
from loratune.report.charts.svg import add, to_markup
from loratune.tables import Table
from loratune.units import byte_size, duration, significant


def undominated(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The points (name, cost, loss) of which no other is as good on both and better on one."""
    best = [
        (name, cost, loss)
        for name, cost, loss in points
        if not any(c <= cost and q <= loss and (c, q) != (cost, loss) for _, c, q in points)
    ]
    return sorted(best, key=lambda point: (point[1], point[2]))


_BESIDE = 11.0
"""Pixels between two markers at one place."""
_COVERED = 7.0
"""Two markers that are closer hide each other."""
_COSTS: dict[str, Callable[[float], str]] = {"bytes": byte_size, "seconds": duration}
"""How a cost in each unit is written."""


def scatter_chart(
    title: str,
    across: str,
    up: str,
    series: Sequence[Series],
    *,
    unit: str = "bytes",
    note: str = "",
) -> Chart | None:
    """Cost across (log scale where it spreads), loss upwards: lower left is better.

    Args:
        title: what it shows.
        across: label of the cost.
        up: label of the loss.
        series: one point each, with its range if it has one.
        unit: of the cost, ``bytes`` or ``seconds``.
        note: how to read it.
    """
    shown = [one for one in series if one.points]
    if not shown:
        return None
    points = [(one.name, one.points[0].x, one.points[0].y) for one in shown]
    heights = [v for s in shown for p in s.points for v in (p.y, p.low, p.high) if v is not None]
    spread = max(x for _, x, _ in points) / max(min(x for _, x, _ in points), 1e-9)
    x_axis = make_axis(across, [x for _, x, _ in points], log=spread >= 4, unit=unit, padding=0.06)
    cost = _COSTS[unit]
    frame = Frame(
        _described(title, shown, cost), x_axis, make_axis(up, heights, padding=0.06), shown
    )
    _draw_front(frame, undominated(points))
    places = _places(frame, [one.points[0] for one in shown])
    for one, place in zip(shown, places, strict=True):
        _draw_point(frame, one, place, cost)
    rows = tuple(
        (one.name, cost(p.x), significant(p.y), p.range_text) for one in shown for p in one.points
    )
    columns = ("", across.partition(",")[0], up, "interval")
    return Chart(title, to_markup(frame.root), Table(f"values of {title}", columns, rows), note)


def quality_charts(
    loss: str,
    trained: Sequence[Series],
    peaks: Sequence[Series],
    memory: str,
    note: str = "",
    seconds: Sequence[Series] = (),
) -> tuple[Chart, ...]:
    """Loss against the bytes that train, against memory and, where measured, against time."""
    note = f"Lower left is better. {note}Dashed: what nothing beats on both."
    across = "trainable bytes (fp32)"
    return drawn(
        scatter_chart("Quality against trainable bytes", across, loss, trained, note=note),
        scatter_chart("Quality against memory", memory, loss, peaks, note=note),
        scatter_chart(
            "Quality against time",
            "seconds of a whole training",
            loss,
            seconds,
            unit="seconds",
            note=note,
        ),
    )


def _draw_front(frame: Frame, front: Sequence[tuple[str, float, float]]) -> None:
    corners: list[tuple[float, float]] = []
    for _, cost, loss in front:
        if corners:
            corners.append((frame.x(cost), corners[-1][1]))
        corners.append((frame.x(cost), frame.y(loss)))
    if len(corners) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        add(frame.root, "polyline", points=path, class_="front")


def _places(frame: Frame, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Where the points lie; only one that would hide another stands beside its place."""
    places: list[tuple[float, float]] = []
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        beside = (x + side * step * _BESIDE for step in itertools.count() for side in (1, -1))
        places.append((next(at for at in beside if not _is_covered(at, y, places)), y))
    return places


def _is_covered(x: float, y: float, places: Sequence[tuple[float, float]]) -> bool:
    return any(math.dist((x, y), place) < _COVERED for place in places)


def _draw_point(
    frame: Frame, series: Series, place: tuple[float, float], cost: Callable[[float], str]
) -> None:
    (x, y), point = place, series.points[0]
    group = add(frame.root, "g", class_="point")
    if point.range:
        whisker(group, series.style, x, *map(frame.y, point.range))
    mark = marker(group, series.look, x, y, 6)
    interval = f"\ninterval {point.range_text}" if point.range else ""
    text = f"{series.name}\n{cost(point.x)}\nloss {significant(point.y)}{interval}"
    add(mark, "title", text)


def _described(title: str, drawn: Sequence[Series], cost: Callable[[float], str]) -> str:
    parts = [
        f"{one.name}: loss {significant(one.points[0].y)} for {cost(one.points[0].x)}"
        for one in drawn
    ]
    return f"{title}. {'; '.join(parts)}."
