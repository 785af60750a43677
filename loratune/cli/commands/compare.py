"""``loratune compare``: try the variants on one task, fairly."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.cli.arguments import TableFormat
from loratune.cli.inputs import require_metrics
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.errors import ConfigError, raise_together

if TYPE_CHECKING:
    from loratune.compare.result import Comparison
    from loratune.compare.settings import Options


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and how to compare; ``out`` is the folder that holds the work."""

    variants: Any = None
    """all, or [lora,vera], [lora,{variant:lora,rank:16}], labels of compare.contenders; null
    takes these, or all."""
    match: str = "own"
    """own ranks, the recipe's rank, or its trainable numbers or bytes (or trainable:589824)."""
    seeds: int | None = None
    """Final trainings of each contender, from trainer.seed on; null takes compare.seeds."""
    lr_grid: list[float] | None = None
    """Learning rates to try; null takes compare.lr_points rates around each variant's own."""
    ratio_grid: list[float] | None = None
    """Values of a variant's second setting (LoRA+'s ratio) to try; null keeps the recipe's."""
    processes: int = 1
    """Processes that share the work here, one thread each."""
    part: str = "1/1"
    """K/N: this is the Kth of N processes started separately (with the same out=DIR)."""
    retry: bool = False
    """Do failed pieces again."""
    format: TableFormat = TableFormat.table
    """table, md, csv or json."""


def run(config: Config, command_line: CommandLine) -> None:
    """Compare, and print what came out."""
    options = _options(config, command_line)
    require_metrics(config)
    from loratune.compare.run import compare, require_a_result
    from loratune.report.build import write_comparison_report

    for_program = config.format is not TableFormat.table
    with contextlib.redirect_stdout(sys.stderr) if for_program else contextlib.nullcontext():
        comparison, folder = compare(config, options)
        write_comparison_report(folder)
        require_a_result(comparison, folder)
    _print(comparison, config.format)
    if not for_program:
        say(f"everything lies in {folder}: report.html, comparison.md, comparison.json")


def _options(config: Config, command_line: CommandLine) -> Options:
    from loratune.compare.settings import Options, parse_part

    seeds = config.compare.seeds if config.seeds is None else config.seeds
    errors = [
        ConfigError(f"{value} is out of range", where=key, fix="use 1 to 1000")
        for key, value in [("seeds", seeds), ("processes", config.processes)]
        if not 1 <= value <= 1000
    ]
    part = parse_part(config.part)
    if part[1] > 1 and "out" not in command_line.keys:
        errors.append(
            ConfigError("parts need one folder to share", where="part", fix="add out=DIR to each")
        )
    raise_together(errors)
    return Options(
        variants=config.variants,
        match=config.match,
        seeds=seeds,
        lr_grid=config.lr_grid,
        ratio_grid=config.ratio_grid,
        processes=config.processes,
        part=part,
        retry=config.retry,
        folders=command_line.folders,
    )


def _print(comparison: Comparison, form: TableFormat) -> None:
    from loratune.compare import tables
    from loratune.files import to_json

    if form == "json":
        print(to_json(comparison.to_dict()), end="")
    elif form == "md":
        print(tables.markdown(comparison), end="")
    elif form == "csv":
        print(tables.csv(comparison), end="")
    else:
        from loratune.tables import show

        for table in tables.screen(comparison):
            show(table)
        for line in comparison.findings:
            say(f"- {line}")
