"""Curves over a common axis, with ranges, markers and values on hover."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from loratune.report.charts.axis import Axis, make_axis
from loratune.report.charts.chart_frame import Chart, Frame
from loratune.report.charts.series import Point, Series, failure_mark, marker, whisker
from loratune.report.charts.svg import add, to_markup
from loratune.tables import Table
from loratune.units import significant


def line_chart(
    title: str,
    across: str,
    up: str,
    series: Sequence[Series],
    *,
    log_across: bool | None = False,
    log_up: bool | None = None,
    unit_across: str = "count",
    note: str = "",
) -> Chart | None:
    """A chart of curves, or ``None`` if there is nothing to draw.

    Args:
        title: what it shows.
        across: label of the horizontal axis, with its unit.
        up: label of the vertical axis, with its unit.
        series: the curves; a point's range becomes a band, and what failed a cross at the top.
        log_across: whether the horizontal axis is logarithmic.
        log_up: the same of the vertical one; ``None`` decides by the spread.
        unit_across: ``bytes``, ``count`` or nothing.
        note: how to read it.
    """
    drawn = [one for one in series if one.points or one.failed]
    if not any(one.points for one in drawn):
        return None
    points = [point for one in drawn for point in one.points]
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    xs = [point.x for point in points] + [x for one in drawn for x in one.failed]
    x_axis = make_axis(across, xs, log=log_across, unit=unit_across, from_zero=True)
    y_axis = make_axis(up, heights, log=log_up)
    frame = Frame(_described(title, drawn, x_axis), x_axis, y_axis, drawn)
    for one in drawn:
        _draw_band(frame, one)
    for one in drawn:
        _draw_curve(frame, one)
    _draw_failures(frame, drawn)
    _draw_hover(frame, drawn, x_axis)
    return Chart(title, to_markup(frame.root), _values(title, drawn, x_axis), note)


def _draw_band(frame: Frame, series: Series) -> None:
    ranges = [(frame.x(p.x), *map(frame.y, p.range)) for p in series.points if p.range]
    if len(ranges) < 2 or not series.line:
        for x, low, high in ranges:
            whisker(frame.root, series.style, x, low, high)
        return
    outline = [(x, high) for x, _, high in ranges] + [(x, low) for x, low, _ in reversed(ranges)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
    add(frame.root, "polygon", points=points, class_=f"{series.style} band")


def _draw_curve(frame: Frame, series: Series) -> None:
    places = [(frame.x(p.x), frame.y(p.y)) for p in series.points]
    if series.line and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        add(
            frame.root,
            "polyline",
            points=path,
            class_=f"{series.style} stroke",
            stroke_dasharray=series.dash,
        )
    if series.markers or len(places) == 1:
        for x, y in places:
            marker(frame.root, series.look, x, y)


def _draw_failures(frame: Frame, drawn: Sequence[Series]) -> None:
    """Crosses at the upper border, those of one place side by side."""
    taken: dict[float, int] = {}
    for one in drawn:
        for x in sorted(one.failed):
            place = frame.x(x) + 7 * taken.get(x, 0)
            taken[x] = taken.get(x, 0) + 1
            failure_mark(frame.root, one, place, frame.top + 6)


def _draw_hover(frame: Frame, drawn: Sequence[Series], across: Axis) -> None:
    """Invisible strips over the plot; the one under the pointer shows its values."""
    failed = {frame.x(x): x for one in drawn for x in one.failed}
    xs = sorted({frame.x(point.x) for one in drawn for point in one.points} | failed.keys())
    edges = [frame.left, *((a + b) / 2 for a, b in pairwise(xs)), frame.right]
    layer = add(frame.root, "g", class_="hover")
    for number, x in enumerate(xs):
        strip = add(layer, "g")
        points = [(one, p) for one in drawn for p in one.points if frame.x(p.x) == x]
        value = points[0][1].x if points else failed[x]
        lines = [f"{across.label.partition(',')[0]}: {significant(value)}"]
        lines += [f"{one.name}: {_text(point)}" for one, point in points]
        lines += [f"{one.name}: failed" for one in drawn if failed.get(x) in one.failed]
        add(strip, "title", "\n".join(lines))
        add(
            strip,
            "rect",
            x=edges[number],
            y=frame.top,
            height=frame.bottom - frame.top,
            width=max(edges[number + 1] - edges[number], 0.5),
        )
        add(strip, "line", x1=x, x2=x, y1=frame.top, y2=frame.bottom)
        for one, point in points:
            marker(strip, one.look, x, frame.y(point.y), 4)


def _text(point: Point) -> str:
    bounds = f" ({point.range_text})" if point.range else ""
    return f"{significant(point.y)}{bounds} {point.text}".rstrip()


def _described(title: str, drawn: Sequence[Series], across: Axis) -> str:
    parts = []
    for one in drawn:
        if not one.points:
            parts.append(f"{one.name} failed everywhere")
            continue
        first, last = one.points[0], one.points[-1]
        parts.append(
            f"{one.name} goes from {significant(first.y)} at {across.show(first.x)} "
            f"to {significant(last.y)} at {across.show(last.x)}"
        )
    return f"{title}, against {across.label}: {'; '.join(parts)}."


def _values(title: str, drawn: Sequence[Series], across: Axis) -> Table:
    xs = sorted({p.x for one in drawn for p in one.points} | {x for s in drawn for x in s.failed})
    by_series = [
        {x: f"failed: {reason}" for x, reason in one.failed.items()}
        | {point.x: _text(point) for point in one.points}
        for one in drawn
    ]
    rows = tuple((significant(x), *(values.get(x, "") for values in by_series)) for x in xs)
    return Table(f"values of {title}", (across.label, *(one.name for one in drawn)), rows)
