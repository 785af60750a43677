"""The sources of a mixture: what each gave, how often it was seen, and its loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratune.report.records import RunRecords
from loratune.tables import Table
from loratune.units import percent, significant

_COLUMNS = (
    "source", "weight", "share of rows drawn", "rows", "tokens", "supervised tokens",
    "times a row is seen an epoch", "last training loss", "loss of the base", "loss of the adapter",
)  # fmt: skip


def source_tables(run: RunRecords) -> Iterator[Table]:
    """One table with a row for each source; none where the run had no sources."""
    sources = [one for one in run.data.get("sources") or [] if isinstance(one, dict)]
    if sources:
        numeric = (False, *[True] * (len(_COLUMNS) - 1))
        rows = tuple(_row(run, source) for source in sources)
        yield Table("sources", _COLUMNS, rows, numeric=numeric, caption=_caption(sources))


def _row(run: RunRecords, source: dict[str, Any]) -> tuple[Any, ...]:
    name, train = str(source.get("name")), source.get("train") or {}
    losses = run.history.pairs(f"train/loss/{name}")
    base = run.evaluation.get("base") or {}
    return (
        name,
        significant(source.get("weight")),
        percent(source.get("share")),
        significant(train.get("kept")),
        significant(train.get("tokens")),
        significant(train.get("supervised_tokens")),
        significant(source.get("passes")),
        significant(losses[-1][1] if losses else None),
        *(significant((side.get("source_losses") or {}).get(name)) for side in (base, run.adapted)),
    )


def _caption(sources: list[dict[str, Any]]) -> str:
    paths = "; ".join(f"{source.get('name')}: {source.get('path')}" for source in sources)
    return f"An epoch draws {significant(sources[0].get('epoch'))} rows. {paths}"
