"""Which columns the tables of parameter counts have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratune.counting.budget import BudgetMatch
from loratune.counting.parameters import ParameterReport
from loratune.counting.published import PublishedRow
from loratune.tables import Cell, Table

_COUNTS = {
    "variant": "variant",
    "rank": "rank",
    "trainable": "trainable",
    "frozen in adapter": "frozen",
    "stored": "stored",
    "stored bytes": "stored_bytes",
    "optimizer bytes": "optimizer_bytes",
    "% of base": "percent_of_base",
    "% of base + adapter": "percent_of_total",
}
"""Heading to key of a parameter report; the percentages name their denominators."""


def variant_table(report: Mapping[str, Any], own: str = "") -> Table:
    """One row a variant of a parameter report as plain values; ``own`` is stressed."""
    rows = tuple(
        tuple(_rounded(row.get(key)) for key in _COUNTS.values()) for row in report["variants"]
    )
    title = (
        f"{report['family']}: {report['base_parameters']:,} base parameters, {report['layers']} "
        f"adapted layers, {report['bytes_per_number']} bytes a stored number"
    )
    marked = frozenset(n for n, row in enumerate(rows) if row[0] == own)
    return Table(title, tuple(_COUNTS), rows, marked=marked)


def _rounded(value: Cell) -> Cell:
    return round(value, 4) if isinstance(value, float) else value


def module_table(report: ParameterReport) -> Table:
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
    return Table("per module", columns, tuple(rows))


def budget_table(matches: Sequence[BudgetMatch]) -> Table:
    """One row a variant: the rank that comes closest to the budget."""
    rows = tuple((m.variant, m.rank or "none", m.reached, m.difference, m.note) for m in matches)
    title = f"closest to {matches[0].budget:,} {matches[0].quantity}" if matches else ""
    return Table(title, ("variant", "rank", "reached", "difference", "note"), rows)


def published_table(rows: Sequence[PublishedRow]) -> Table:
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
    return Table("published counts, recomputed", columns, cells)
