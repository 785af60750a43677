"""``loratune count-params``: the variants' parameters, bytes and budgets, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from loratune.cli.arguments import TableFormat
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.errors import ConfigError
from loratune.files import to_json

if TYPE_CHECKING:
    from loratune.counting.published import PublishedRow
    from loratune.counting.variant_table import VariantTable
    from loratune.tables import Table


@dataclass(kw_only=True)
class Config(RunConfig):
    """A model, targets, and what to count."""

    rank: int | None = None
    """Rank of every variant; null takes each variant's own (adapter/NAME.yaml)."""
    variants: Any = "all"
    """all, or a list: [lora,vera]."""
    per_module: bool = False
    """One row a layer."""
    published: bool = False
    """Recompute the counts that papers and documentation print, and judge them."""
    match: str | None = None
    """A budget, trainable:589824 or bytes:6MB: the rank at which each variant reaches it."""
    activations: bool = False
    """Also measure what autograd keeps for the backward pass (imports torch)."""
    format: TableFormat = TableFormat.table
    """table, md, csv or json."""


def run(config: Config, command_line: CommandLine) -> None:
    """Print the report in the chosen format."""
    if config.published:
        _print_published(config.format)
        return
    if config.match is not None and config.rank is not None:
        raise ConfigError(
            "rank and match exclude each other", where="rank, match", fix="set one of them"
        )
    from loratune.counting.variant_table import count_table, own_numbers

    config = replace(config, model=own_numbers(config.model, command_line.keys))
    table = count_table(
        config,
        _names(config.variants),
        config.rank,
        match=config.match,
        activations=config.activations,
        folders=command_line.folders,
    )
    _print_table(table, config)


def _names(variants: Any) -> list[str] | None:
    if variants in ("all", None):
        return None
    names = variants if isinstance(variants, list) else str(variants).split(",")
    if not names:
        raise ConfigError("no variant is named", where="variants", fix="variants=all")
    return [str(name).strip() for name in dict.fromkeys(names)]


def _print_table(table: VariantTable, config: Config) -> None:
    from loratune.counting.tables import budget_table, module_table, variant_table

    if config.format == "json":
        print(to_json(table.to_dict(per_module=config.per_module)), end="")
        return
    tables = [budget_table(table.matches)] if table.matches else []
    if config.per_module:
        tables.append(module_table(table.report))
    elif not (table.matches and config.format == "csv"):
        tables.append(variant_table(table.report.to_dict()))
    if table.activations:
        tables.append(_activation_table(table))
    _print_tables(tables, config.format, table.notes)


def _activation_table(table: VariantTable) -> Table:
    from loratune.tables import Table

    rows = tuple(
        (a.variant, a.rank, round(a.base), round(a.added), round(a.base + a.added))
        for a in table.activations
    )
    tokens = table.activations[0].tokens
    title = f"bytes autograd keeps per token in one block (fp32, measured on {tokens} tokens)"
    return Table(title, ("variant", "rank", "base alone", "added by adapters", "together"), rows)


def _print_published(form: TableFormat) -> None:
    from loratune.counting.published import published_report
    from loratune.counting.tables import published_table

    rows = published_report()
    if form == "json":
        print(to_json([asdict(row) for row in rows]), end="")
    elif form == "table":
        for line in _published_lines(rows):
            say(line)
    else:
        _print_tables([published_table(rows)], form, ())


def _published_lines(rows: list[PublishedRow]) -> Iterator[str]:
    """One block a recipe: a table of eight columns would not fit a terminal."""
    heading = ""
    for row in rows:
        counted = "" if row.trains_here else ", counted only"
        block = f"{row.recipe}   ({row.source}{counted})"
        if block != heading:
            heading = block
            yield block
        quantity = row.quantity.replace("_", " ")
        exact = f"exact {row.shown or '-'}"
        yield f"  {quantity:<17} printed {row.printed:<20} {exact:<27} {row.verdict}"
        for text in (row.meant and f"it is the number of {row.meant}", row.explanation):
            if text:
                yield f"      {text}"
    verdicts = Counter(str(row.verdict) for row in rows)
    yield f"{len(rows)} published numbers: " + ", ".join(f"{n} {v}" for v, n in verdicts.items())


def _print_tables(tables: list[Table], form: TableFormat, notes: tuple[str, ...]) -> None:
    if form == "csv":
        print("\n".join(table.to_csv() for table in tables), end="")
    elif form == "md":
        print("\n".join(table.to_markdown() for table in tables))
        print("\n".join(f"- {note}" for note in notes))
    else:
        from loratune.tables import show

        for table in tables:
            show(table)
        for note in notes:
            say(f"- {note}")
