"""Reports as tables: for a terminal, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.counting.budget import BudgetMatch
from loratune.counting.parameters import ParameterReport
from loratune.counting.published import PublishedRow
from loratune.files import to_json

if TYPE_CHECKING:
    from rich.table import Table

Cell = str | int | float
_LINE = 110


@dataclass(frozen=True, slots=True)
class Grid:
    """A titled table; numbers stay numbers until something prints them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def variant_grid(report: ParameterReport) -> Grid:
    """One row a variant; the percentages name their denominators."""
    columns = (
        "variant",
        "rank",
        "trainable",
        "frozen in adapter",
        "stored",
        "stored bytes",
        "optimizer bytes",
        "% of base",
        "% of base + adapter",
    )
    rows = tuple(
        (
            row.variant,
            row.rank,
            row.trainable,
            row.frozen,
            row.stored,
            row.stored_bytes,
            row.optimizer_bytes,
            round(row.percent_of_base, 4),
            round(row.percent_of_total, 4),
        )
        for row in report.variants
    )
    title = (
        f"{report.family}: {report.base_parameters:,} base parameters, {report.layers} adapted "
        f"layers, {report.bytes_per_number} bytes a stored number"
    )
    return Grid(title, columns, rows)


def module_grid(report: ParameterReport) -> Grid:
    """One row a variant and layer; matrices that layers share are a row of their own."""
    rows: list[tuple[Cell, ...]] = []
    for variant in report.variants:
        for module in variant.modules:
            shape = f"{module.in_features} → {module.out_features}" if module.in_features else ""
            counts = (module.trainable, module.frozen)
            rows.append((variant.variant, module.name, module.kind, shape, module.rank, *counts))
        if variant.shared:
            name = "(shared by all layers)"
            rows.append((variant.variant, name, "matrices", "", variant.rank, 0, variant.shared))
    columns = ("variant", "module", "kind", "in → out", "rank", "trainable", "frozen in adapter")
    return Grid("per module", columns, tuple(rows))


def budget_grid(matches: Sequence[BudgetMatch]) -> Grid:
    """One row a variant: the rank that comes closest to the budget."""
    rows = tuple(
        (
            match.variant,
            match.rank if match.rank is not None else "none",
            match.reached,
            match.difference,
            match.note,
        )
        for match in matches
    )
    title = f"closest to {matches[0].budget:,} {matches[0].quantity}" if matches else ""
    return Grid(title, ("variant", "rank", "reached", "difference", "note"), rows)


def published_grid(rows: Sequence[PublishedRow]) -> Grid:
    """One row a published number."""
    columns = ("source", "recipe", "quantity", "printed", "exact", "verdict", "really", "why")
    cells = tuple(
        (
            row.source,
            row.recipe if row.trains_here else f"{row.recipe} (counted only)",
            row.quantity.replace("_", " "),
            row.printed,
            row.shown,
            str(row.verdict),
            row.meant,
            row.explanation,
        )
        for row in rows
    )
    return Grid("published counts, recomputed", columns, cells)


def _text(cell: Cell) -> str:
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _is_numeric(grid: Grid, column: int) -> bool:
    return any(isinstance(row[column], int | float) for row in grid.rows)


def to_markdown(grid: Grid) -> str:
    """A GitHub table; numbers are aligned right."""
    numeric = [_is_numeric(grid, column) for column in range(len(grid.columns))]
    lines = [[*grid.columns], ["---:" if right else "---" for right in numeric]]
    lines += [[_text(cell).replace("|", "\\|") for cell in row] for row in grid.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{grid.title}\n\n{body}\n"


def to_csv(grid: Grid) -> str:
    """Header and rows; numbers without separators."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([grid.columns, *grid.rows])
    return text.getvalue()


def to_rich(grid: Grid) -> Table:
    """A table for the terminal; nothing in it is read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(grid.title), title_justify="left")
    share = _LINE // len(grid.columns) - 3
    for column, name in enumerate(grid.columns):
        right = _is_numeric(grid, column)
        # Headers wrap where a line is short; a number never does, nor does a word of text up to
        # its fair share of the line.
        cells = [_text(row[column]) for row in grid.rows]
        widest = max((len(part) for cell in cells for part in cell.split(" ")), default=0)
        table.add_column(
            Text(name),
            justify="right" if right else "left",
            overflow="fold",
            min_width=widest if right else min(widest, share),
        )
    for row in grid.rows:
        table.add_row(*(Text(_text(cell)) for cell in row))
    return table


def transposed(grid: Grid) -> Grid:
    """Rows as columns, named by their first cells: for a terminal too narrow for the table."""
    names = tuple(str(row[0]) for row in grid.rows)
    rows = tuple(
        (name, *(row[column] for row in grid.rows))
        for column, name in enumerate(grid.columns)
        if column
    )
    return Grid(grid.title, ("", *names), rows)


def report_json(report: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Any report's ``to_dict()``, or a list of them, as JSON."""
    return to_json(report)
