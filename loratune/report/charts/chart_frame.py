"""What every chart shares: the plot area, its axes and gridlines, the legend, the hover values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from loratune.report.charts.axis import Axis
from loratune.report.charts.series import Series, marker
from loratune.report.charts.svg import FONT, add, canvas, clean, shorten, text_width
from loratune.tables import Table

WIDTH = 460.0
_LEGEND_ROW = 19.0
_LONGEST_NAME = 34


@dataclass(frozen=True)
class Chart:
    """A finished drawing.

    Attributes:
        title: what it shows.
        drawing: the SVG.
        note: one sentence on how to read it.
        values: what is drawn, for those who cannot see the drawing.
    """

    title: str
    drawing: Markup
    values: Table
    note: str = ""


def drawn(*charts: Chart | None) -> tuple[Chart, ...]:
    """Those that have something to draw."""
    return tuple(chart for chart in charts if chart is not None)


class Frame:
    """A plot area with axes; ``x`` and ``y`` give a value's place in it."""

    def __init__(
        self, label: str, across: Axis, up: Axis, series: Sequence[Series], plot: float = 200.0
    ) -> None:
        self.across, self.up = across, up
        legend = _legend_rows(series) if len(series) > 1 else []
        self.left = 20 + max(30.0, max(text_width(up.show(tick)) for tick in up.ticks) + 8)
        self.right, self.top = WIDTH - 14, 8 + len(legend) * _LEGEND_ROW + 6
        self.bottom = self.top + plot
        self.root = canvas(WIDTH, self.bottom + 46, label)
        self._draw_legend(legend)
        self._draw_axes()

    def x(self, value: float) -> float:
        """Where a value lies across."""
        return self.left + self.across.place(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Where a value lies in height."""
        return self.bottom - self.up.place(value) * (self.bottom - self.top)

    def _draw_legend(self, rows: Sequence[Sequence[tuple[Series, float]]]) -> None:
        for number, row in enumerate(rows):
            height = 8 + number * _LEGEND_ROW + 8
            for series, x in row:
                if series.line:
                    add(
                        self.root,
                        "line",
                        x1=x,
                        x2=x + 24,
                        y1=height,
                        y2=height,
                        class_=f"{series.style} stroke",
                        stroke_dasharray=series.dash,
                    )
                if series.markers:
                    marker(self.root, series.look, x + 12, height, 4)
                name = shorten(clean(series.name), _LONGEST_NAME)
                add(self.root, "text", name, x=x + 30, y=height + 4.5)

    def _draw_axes(self) -> None:
        grid = add(self.root, "g", class_="grid")
        for tick in self.up.ticks:
            y = self.y(tick)
            add(grid, "line", x1=self.left, x2=self.right, y1=y, y2=y)
            add(
                self.root, "text", self.up.show(tick), x=self.left - 6, y=y + 4.5, text_anchor="end"
            )
        shown_until = -1.0
        for tick in self.across.ticks:
            x, text = self.x(tick), self.across.show(tick)
            half = text_width(text) / 2
            middle = min(max(x, half), WIDTH - half)
            add(grid, "line", x1=x, x2=x, y1=self.top, y2=self.bottom)
            if middle - half > shown_until:
                add(self.root, "text", text, x=middle, y=self.bottom + 20, text_anchor="middle")
                shown_until = middle + half + 4
        for x2, y1 in ((self.right, self.bottom), (self.left, self.top)):
            add(self.root, "line", class_="axis", x1=self.left, x2=x2, y1=y1, y2=self.bottom)
        middle = (self.left + self.right) / 2
        add(
            self.root,
            "text",
            self.across.label,
            x=middle,
            y=self.bottom + 39,
            class_="label",
            text_anchor="middle",
        )
        height = (self.top + self.bottom) / 2
        add(
            self.root,
            "text",
            self.up.label,
            x=12,
            y=height,
            class_="label",
            text_anchor="middle",
            transform=f"rotate(-90 12 {height:.1f})",
        )


def _legend_rows(series: Sequence[Series]) -> list[list[tuple[Series, float]]]:
    rows: list[list[tuple[Series, float]]] = []
    end = WIDTH
    for one in series:
        width = 30 + text_width(shorten(clean(one.name), _LONGEST_NAME), FONT) + 16
        if end + width > WIDTH or not rows:
            rows.append([])
            end = 6.0
        rows[-1].append((one, end))
        end += width
    return rows
