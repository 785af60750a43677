"""What each variant would train, store and hold for the optimizer, whole and per module."""

from __future__ import annotations

import re
from typing import Any

from loratune.report.numbers import byte_size, significant
from loratune.report.page import Folded, Section, Table
from loratune.report.records import RunRecords

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.)")


def parameter_section(run: RunRecords) -> Section:
    """All variants side by side, the run's own stressed."""
    variants: list[dict[str, Any]] = run.parameters.get("variants") or []
    if not variants:
        return Section("parameters", "Parameters")
    own = next((n for n, row in enumerate(variants) if row["variant"] == run.variant), None)
    base, layers = run.parameters["base_parameters"], run.parameters["layers"]
    return Section(
        "parameters",
        "Parameters",
        text=(
            f"{layers} layers of a base model with {base:,} parameters. Stored bytes count "
            f"{run.parameters['bytes_per_number']} bytes a number; the optimizer keeps two fp32 "
            "moments of every number that trains.",
        ),
        tables=(_whole(variants, own),),
        folded=(
            Folded("Per kind of module", (_modules(_kinds(variants), variants, "kind of module"),)),
            Folded("Per module", (_modules(_each(variants), variants, "module"),), long=True),
        ),
    )


def _whole(variants: list[dict[str, Any]], own: int | None) -> Table:
    columns = (
        "variant", "rank", "trained", "% of base", "frozen in adapter", "stored", "optimizer"
    )  # fmt: skip
    rows = tuple(
        (
            row["variant"],
            str(row["rank"]),
            f"{row['trainable']:,}",
            f"{significant(row['percent_of_base'], 3)} %",
            f"{row['frozen']:,}",
            byte_size(row["stored_bytes"]),
            byte_size(row["optimizer_bytes"]),
        )
        for row in variants
    )
    caption = "every variant that can adapt these layers" + (
        "; this run's own is shaded" if own is not None else ""
    )
    marked = frozenset() if own is None else frozenset({own})
    return Table(columns, rows, caption=caption, marked=marked)


def _each(variants: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Module name to its row of every variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        for module in variant["modules"]:
            found.setdefault(module["name"], []).append(module)
    return found


def _kinds(variants: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same with the blocks' numbers left out and like modules summed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, modules in _each(variants).items():
        kind = _LAYER_NUMBER.sub(".*", name)
        if kind not in found:
            found[kind] = [{**module, "count": 1} for module in modules]
            continue
        for total, module in zip(found[kind], modules, strict=False):
            total["trainable"] += module["trainable"]
            total["frozen"] += module["frozen"]
            total["count"] += 1
    return {f"{kind} ({rows[0]['count']}×)": rows for kind, rows in found.items()}


def _modules(
    found: dict[str, list[dict[str, Any]]], variants: list[dict[str, Any]], heading: str
) -> Table:
    names = tuple(row["variant"] for row in variants)
    rows = [
        (name, _shape(modules[0]), *(f"{module['trainable']:,}" for module in modules))
        for name, modules in found.items()
    ]
    frozen = tuple(f"{row['frozen']:,}" for row in variants)
    rows.append(("frozen in the adapter, all modules", "", *frozen))
    columns = (heading, "in → out", *names)
    return Table(columns, tuple(rows), caption="numbers that train")


def _shape(module: dict[str, Any]) -> str:
    if not module["in_features"]:
        return str(module["kind"])
    return f"{module['in_features']:,} → {module['out_features']:,}"
