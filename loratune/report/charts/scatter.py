"""Quality against cost, with the points that nothing beats on both."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.report.charts.axis import make_axis
from loratune.report.charts.chart_frame import Chart, Frame
from loratune.report.charts.series import Point, Series, marker
from loratune.report.charts.svg import add, to_markup
from loratune.tables import Table
from loratune.units import byte_size, significant


def undominated(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The points (name, cost, loss) of which no other is as good on both and better on one."""
    best = [
        (name, cost, loss)
        for name, cost, loss in points
        if not any(c <= cost and q <= loss and (c, q) != (cost, loss) for _, c, q in points)
    ]
    return sorted(best, key=lambda point: (point[1], point[2]))


def scatter_chart(
    title: str, across: str, up: str, series: Sequence[Series], *, note: str = ""
) -> Chart | None:
    """Cost in bytes across (log scale), loss upwards: lower left is better.

    Args:
        title: what it shows.
        across: label of the cost.
        up: label of the loss.
        series: one point each, with its range if it has one.
        note: how to read it.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    points = [(one.name, one.points[0].x, one.points[0].y) for one in drawn]
    heights = [v for s in drawn for p in s.points for v in (p.y, p.low, p.high) if v is not None]
    spread = max(x for _, x, _ in points) / max(min(x for _, x, _ in points), 1e-9)
    x_axis = make_axis(
        across, [x for _, x, _ in points], log=spread >= 4, unit="bytes", padding=0.06
    )
    frame = Frame(_described(title, drawn), x_axis, make_axis(up, heights, padding=0.06), drawn)
    _draw_front(frame, undominated(points))
    places = _places(frame, [one.points[0] for one in drawn])
    for one, place in zip(drawn, places, strict=True):
        _draw_point(frame, one, place)
    rows = tuple(
        (s.name, byte_size(s.points[0].x), significant(s.points[0].y), _range(s.points[0]))
        for s in drawn
    )
    columns = ("", across.partition(",")[0], up, "interval")
    return Chart(title, to_markup(frame.root), Table(f"values of {title}", columns, rows), note)


def _range(point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    return f"{significant(point.low)} to {significant(point.high)}"


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
    """Where the points lie; those that would cover each other stand side by side."""
    places: list[tuple[float, float]] = []
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        while any(abs(x - a) < 11 and abs(y - b) < 40 for a, b in places):
            x -= 12
        places.append((x, y))
    return places


def _draw_point(frame: Frame, series: Series, place: tuple[float, float]) -> None:
    (x, y), point, style = place, series.points[0], f"{series.style} stroke"
    group = add(frame.root, "g", class_="point")
    if point.low is not None and point.high is not None:
        low, high = frame.y(point.low), frame.y(point.high)
        add(group, "line", x1=x, x2=x, y1=low, y2=high, class_=style)
        for end in (low, high):
            add(group, "line", x1=x - 4, x2=x + 4, y1=end, y2=end, class_=style)
    mark = marker(group, series.look, x, y, 6)
    interval = f"\ninterval {_range(point)}" if _range(point) else ""
    text = f"{series.name}\n{byte_size(point.x)}\nloss {significant(point.y)}{interval}"
    add(mark, "title", text)


def _described(title: str, drawn: Sequence[Series]) -> str:
    parts = [
        f"{one.name}: loss {significant(one.points[0].y)} for {byte_size(one.points[0].x)}"
        for one in drawn
    ]
    return f"{title}. {'; '.join(parts)}."
