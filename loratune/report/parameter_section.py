"""What each variant would train, store and hold for the optimizer, whole and per module."""

from __future__ import annotations

import re
from typing import Any

from loratune.counting.tables import variant_table
from loratune.report.page import Folded, Section
from loratune.report.records import RunRecords
from loratune.tables import Cell, Table

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.)")


def parameter_section(run: RunRecords) -> Section:
    """All variants side by side, the run's own stressed."""
    variants: list[dict[str, Any]] = run.parameters.get("variants") or []
    if not variants:
        return Section("parameters", "Parameters")
    base, layers = run.parameters["base_parameters"], run.parameters["layers"]
    return Section(
        "parameters",
        "Parameters",
        text=(
            f"{layers} layers of a base model with {base:,} parameters. Stored bytes count "
            f"{run.parameters['bytes_per_number']} bytes a number; the optimizer keeps two fp32 "
            "moments of every number that trains. Every variant that can adapt these layers has a "
            "row; this run's own is shaded.",
        ),
        tables=(variant_table(run.parameters, run.variant),),
        folded=(
            Folded("Per kind of module", (_modules(_kinds(variants), variants, "kind of module"),)),
            Folded("Per module", (_modules(_each(variants), variants, "module"),), long=True),
        ),
    )


def _each(variants: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Module name to its row of every variant."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        for module in variant["modules"]:
            by_name.setdefault(module["name"], []).append(module)
    return by_name


def _kinds(variants: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same with the blocks' numbers left out and like modules summed."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, modules in _each(variants).items():
        kind = _LAYER_NUMBER.sub(".*", name)
        if kind not in kinds:
            kinds[kind] = [{**module, "count": 1} for module in modules]
            continue
        for total, module in zip(kinds[kind], modules, strict=False):
            total["trainable"] += module["trainable"]
            total["frozen"] += module["frozen"]
            total["count"] += 1
    return {f"{kind} ({rows[0]['count']}×)": rows for kind, rows in kinds.items()}


def _modules(
    by_name: dict[str, list[dict[str, Any]]], variants: list[dict[str, Any]], heading: str
) -> Table:
    names = tuple(row["variant"] for row in variants)
    rows: list[tuple[Cell, ...]] = [
        (name, _shape(modules[0]), *(module["trainable"] for module in modules))
        for name, modules in by_name.items()
    ]
    rows.append(("frozen in the adapter, all modules", "", *(row["frozen"] for row in variants)))
    columns = (heading, "in → out", *names)
    return Table("modules", columns, tuple(rows), caption="numbers that train")


def _shape(module: dict[str, Any]) -> str:
    if not module["in_features"]:
        return str(module["kind"])
    return f"{module['in_features']:,} → {module['out_features']:,}"
