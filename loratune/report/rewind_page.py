"""What a sweep of an adapter's scale showed: a table, and a page with the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratune.report.charts.chart_frame import Chart, drawn
from loratune.report.charts.line import line_chart
from loratune.report.charts.series import Point, Series
from loratune.report.page import Page, Section
from loratune.scoring.registry import EXACT_MATCH, metric_label
from loratune.tables import Table
from loratune.units import percent, significant

_LOSS = "loss, nats per token"


def rewind_table(points: Sequence[Mapping[str, Any]], chosen: float) -> Table:
    """A line a scale; the chosen one is marked.

    Args:
        points: as ``rewind.json`` has them.
        chosen: the scale that was taken.
    """
    first = points[0]
    metrics = [name for name in first["dev"]["scores"] if name != "loss"]
    rows = tuple(
        (
            f"{point['scale']:g}",
            significant(point["dev"]["loss"]),
            *(_score(point["dev"]["scores"][name]["value"], name) for name in metrics),
            *(significant(side["loss"]) for side in point["retention"].values()),
        )
        for point in points
    )
    columns = (
        "scale",
        f"dev {_LOSS}",
        *map(metric_label, metrics),
        *(f"loss on {name}" for name in first["retention"]),
    )
    marked = frozenset(n for n, point in enumerate(points) if point["scale"] == chosen)
    caption = "0 is the base and 1 the adapter as it was trained."
    return Table("the adapter's scale", columns, rows, caption=caption, marked=marked)


def rewind_page(record: Mapping[str, Any], source: str, footer: str) -> Page:
    """The page of a sweep.

    Args:
        record: ``rewind.json``.
        source: the adapter's folder.
        footer: when and by what it was written.
    """
    points, chosen = record["points"], record["scale"]
    table = rewind_table(points, chosen)
    return Page(
        kicker="loratune rewind",
        title=f"The scale of {source}",
        verdict=(f"Scale {chosen:g} was taken: {record['reason']}.",),
        warnings=(),
        cards=(),
        sections=(Section("curve", "Loss against scale", charts=_charts(points), tables=(table,)),),
        footer=footer,
    )


def _charts(points: Sequence[Mapping[str, Any]]) -> tuple[Chart, ...]:
    """The rows to choose by, and every retention file, in a chart of its own."""
    names = list(points[0]["retention"])
    dev = [Point(p["scale"], p["dev"]["loss"]) for p in points]
    charts = [_chart("rows to choose by", dev, 0)]
    for look, name in enumerate(names, start=1):
        kept = [Point(p["scale"], p["retention"][name]["loss"]) for p in points]
        charts.append(_chart(name, kept, look))
    return drawn(*charts)


def _chart(name: str, points: Sequence[Point], look: int) -> Chart | None:
    series = [Series(name, tuple(points), look, markers=True)]
    return line_chart(
        f"Loss on {name}", "scale of the adapter", _LOSS, series, unit_across="", log_up=False
    )


def _score(value: float, name: str) -> str:
    return percent(value) if name == EXACT_MATCH else significant(value)
