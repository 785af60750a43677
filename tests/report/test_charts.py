"""Drawings put values where their axes say."""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import fmean
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from loratune.report.charts.axis import make_axis
from loratune.report.charts.interval import Interval, interval_chart
from loratune.report.charts.line import line_chart
from loratune.report.charts.scatter import scatter_chart, undominated
from loratune.report.charts.series import Point, Series, condensed


def drawing(chart: object) -> Element:
    return ElementTree.fromstring(str(chart.drawing))  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(20))
def test_every_value_lies_between_the_ends_of_its_axis(seed: int) -> None:
    source = random.Random(seed)
    scale = 10.0 ** source.uniform(-9, 9)
    values = [source.uniform(-1, 1) * scale for _ in range(5)]
    for log in (None, False, True):
        shown = [abs(v) for v in values] if log else values
        axis = make_axis("x", shown, log=log)
        places = [axis.place(value) for value in shown]
        assert all(0 <= place <= 1 for place in places)
        assert sorted(shown) == [shown[i] for i in sorted(range(5), key=places.__getitem__)]
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
        assert 1 <= len(axis.ticks) <= 9
        assert len({axis.show(tick) for tick in axis.ticks}) == len(axis.ticks)


@pytest.mark.parametrize("values", [[], [0.0], [5.0], [-3.0, -3.0], [math.nan, 1.0], [1e-12]])
def test_degenerate_values_still_give_an_axis(values: list[float]) -> None:
    for log in (None, False, True):
        axis = make_axis("x", values, log=log)
        assert axis.low < axis.high


def test_a_log_axis_has_equal_steps_for_equal_factors() -> None:
    axis = make_axis("x", [1.0, 10.0, 100.0], log=True)
    first, second, third = (axis.place(value) for value in (1.0, 10.0, 100.0))
    assert second - first == pytest.approx(third - second)


def test_a_wide_spread_of_losses_chooses_a_log_axis_by_itself() -> None:
    assert make_axis("loss", [4.5, 0.009]).log
    assert not make_axis("loss", [4.5, 0.9]).log
    assert not make_axis("difference", [-4.5, 0.009]).log


def test_a_curve_passes_through_its_points() -> None:
    chart = line_chart(
        "t", "steps", "loss", [Series("a", (Point(0, 0), Point(5, 1), Point(10, 2)))]
    )
    (path,) = drawing(chart).iter("polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in path.get("points", "").split()]
    (x0, y0), (x1, y1), (x2, y2) = corners
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y2 < y0  # larger values stand higher


def test_hover_names_every_series_at_its_place() -> None:
    series = [Series("first", (Point(1, 2.5, 2, 3),)), Series("second", (Point(1, 7),), 1)]
    titles = [e.text for e in drawing(line_chart("t", "steps", "loss", series)).iter("title")]
    assert titles == ["steps: 1\nfirst: 2.5 (2 to 3)\nsecond: 7"]


def test_every_series_has_a_look_of_its_own_without_colour() -> None:
    dashes = {Series("", (), look).dash for look in range(6)}
    assert len(dashes) == 6
    series = [Series(str(n), (Point(n, n),), n, markers=True) for n in range(6)]
    root = drawing(scatter_chart("t", "bytes", "loss", [_single(s) for s in series]))
    marks = _marks(root)
    assert len(marks) == len({_outline(mark) for mark in marks}) == 6


def _marks(root: Element) -> list[Element]:
    """The markers of the points, without those of the legend."""
    groups = (group for group in root.iter("g") if group.get("class") == "point")
    return [m for group in groups for m in group if "mark" in (m.get("class") or "").split()]


def _single(series: Series) -> Series:
    return Series(
        series.name, (Point(10.0**series.look, series.look + 1),), series.look, line=False
    )


def _corners(mark: Element) -> list[tuple[float, float]]:
    pairs = (mark.get("points") or f"{mark.get('cx')},{mark.get('cy')}").split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


def _centre(mark: Element) -> tuple[float, float]:
    corners = _corners(mark)
    return sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners)


def _outline(mark: Element) -> tuple[object, ...]:
    """A mark's shape, wherever it lies."""
    (left, top), *others = _corners(mark)
    return mark.tag, *((round(x - left, 1), round(y - top, 1)) for x, y in others)


def test_many_steps_are_condensed_to_means_with_their_range() -> None:
    pairs = [(float(n), float(n % 2)) for n in range(6000)]
    points = condensed(pairs)
    assert len(points) == 60
    assert all(p.y == pytest.approx(0.5) and (p.low, p.high) == (0, 1) for p in points)
    assert condensed([(1.0, math.nan), (2.0, 3.0)]) == (Point(2.0, 3.0),)


def test_the_front_keeps_what_nothing_beats_on_both() -> None:
    points = [("a", 1, 9), ("b", 2, 5), ("c", 3, 6), ("d", 4, 1), ("e", 4, 2)]
    assert [name for name, _, _ in undominated(points)] == ["a", "b", "d"]


def test_points_of_equal_cost_and_loss_do_not_cover_each_other() -> None:
    series = [
        Series(str(n), (Point(100.0, loss),), n, line=False, markers=True)
        for n, loss in enumerate([1.0, 1.0, 1.0, 2.0, 1.01])
    ]
    root = drawing(scatter_chart("t", "bytes", "loss", series))
    marks = _marks(root)
    assert len(marks) == 5
    for one, other in combinations([_centre(mark) for mark in marks], 2):
        assert math.dist(one, other) > 10
    across = [_centre(mark)[0] for mark in marks]
    place = across[0]  # the first one of a place stands on it
    assert all(abs(x - place) <= 2 * 11 + 1e-6 for x in across)
    assert min(across) < place < max(across)


def test_points_that_are_only_near_each_other_stand_at_their_costs() -> None:
    costs = [100.0, 103.0, 110.0, 200.0]
    series = [Series(str(x), (Point(x, 1 + x / 1000),), n) for n, x in enumerate(costs)]
    centres = [_centre(mark)[0] for mark in _marks(drawing(scatter_chart("t", "b", "l", series)))]
    one = (centres[-1] - centres[0]) / 100
    across = [centres[0] + one * (x - 100) for x in costs]
    assert centres == pytest.approx(across, abs=0.01)


def test_intervals_not_told_from_zero_are_drawn_hollow() -> None:
    chart = interval_chart(
        "t", "d", [Interval("sure", 1, 0.5, 1.5, True), Interval("open", 1, -1, 3, False)]
    )
    groups = [e.get("class") for e in drawing(chart).iter("g") if e.find("title") is not None]
    assert groups == ["point", "point open"]
    assert interval_chart("t", "d", []) is None


def test_a_training_that_failed_is_a_cross_at_the_top_and_a_word_in_the_values() -> None:
    lost = Series("lost", (), 1, failed={2.0: "diverged"})
    partly = Series("partly", (Point(1, 5), Point(4, 3)), failed={2.0: "no memory"})
    chart = line_chart("t", "rate", "loss", [partly, lost])
    assert chart is not None
    crosses = [e for e in drawing(chart).iter("g") if "failed" in (e.get("class") or "")]
    middles = [fmean(float(line.get("x1") or 0) + 4 for line in cross) for cross in crosses]
    assert len(crosses) == 2 and abs(middles[0] - middles[1]) >= 7
    lines = drawing(chart).findall(".//line[@class='axis']")
    top = min(float(line.get("y1") or 0) for line in lines)
    for cross in crosses:
        assert all(top <= float(line.get("y1") or 0) <= top + 12 for line in cross)
    assert "rate: 2\npartly: failed\nlost: failed" in [e.text for e in drawing(chart).iter("title")]
    assert ("2", "failed: no memory", "failed: diverged") in chart.values.rows
    assert line_chart("t", "rate", "loss", [lost]) is None


def test_costs_in_seconds_are_written_as_times() -> None:
    series = [Series(str(n), (Point(90.0 * 2**n, 1.0 + n),), n, markers=True) for n in range(2)]
    chart = scatter_chart("t", "seconds", "loss", series, unit="seconds")
    assert chart is not None
    assert [row[1] for row in chart.values.rows] == ["90 s", "3 min"]


def test_a_colour_that_comes_again_has_another_marker_and_dash() -> None:
    looks = {(Series("", (), n).style, Series("", (), n).dash) for n in range(36)}
    assert len(looks) == 36


def test_nothing_to_draw_gives_no_chart() -> None:
    assert line_chart("t", "x", "y", [Series("a", ())]) is None
    assert scatter_chart("t", "x", "y", []) is None


UGLY = {
    "constant": [2e-4] * 700,
    "constant but for rounding": [0.1 + 0.2 if n % 2 else 0.3 for n in range(700)],
    "single": [3.0],
    "zero": [0.0] * 5,
    "huge": [1.7e308, -1.7e308] * 400,
    "constant and huge": [1.7e308] * 700,
    "tiny": [5e-324, 1e-310, 0.0],
    "from tiny to huge": [5e-324, 1.7e308],
    "not numbers": [math.nan, math.inf, -math.inf],
    "partly not numbers": [1.0, math.nan, math.inf, 2.0],
}


@pytest.mark.parametrize("values", UGLY.values(), ids=UGLY)
@pytest.mark.parametrize("log", [None, False, True])
def test_every_series_draws(values: list[float], log: bool | None) -> None:
    points = condensed(list(enumerate(values)))
    assert all(p.range[0] <= p.y <= p.range[1] for p in points if p.range)
    line = line_chart("t", "x", "y", [Series("a", points)], log_up=log)
    assert (line is None) == (not points)
    raw = tuple(Point(abs(y), y, -abs(y), abs(y)) for y in values[:3])
    scatter = scatter_chart("t", "x", "y", [_single(Series("a", (point,))) for point in raw])
    intervals = [Interval("a", y, -abs(y), abs(y), True) for y in values[:3]]
    for chart in (line, scatter, interval_chart("t", "d", intervals)):
        if chart is not None:
            drawing(chart)
