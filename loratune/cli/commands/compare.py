"""``loratune compare``: try the variants on one task, fairly."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratune.cli.commands.evaluate import check_format
from loratune.cli.hydra_app import given_keys
from loratune.config.recipes.folders import UserRecipes
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, raise_together

if TYPE_CHECKING:
    from loratune.compare.options import Options
    from loratune.compare.result import Comparison

FORMATS = ("table", "md", "csv", "json")


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and how to compare; ``out`` is the folder that holds the work."""

    variants: Any = "all"
    """all, or a list of names and settings: [lora,vera] or [lora,{variant:lora,rank:16}]."""
    match: str = "own"
    """own ranks, the recipe's rank, or its trainable numbers or bytes (or trainable:589824)."""
    seeds: int | None = None
    """Final trainings of each variant, from trainer.seed on; null takes compare.seeds."""
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
    format: str = "table"
    """table, md, csv or json."""


def run(config: Config, overrides: list[str]) -> None:
    """Compare, and print what came out."""
    check_format(config.format, FORMATS)
    options = _options(config, given_keys(overrides))
    quiet_profiler()
    from loratune.compare.run import compare, require_a_result
    from loratune.report.build import write_comparison_report

    with _told_on_stderr(config.format != "table"):
        comparison, folder = compare(config, options)
        write_comparison_report(folder)
        require_a_result(comparison, folder)
    _print(comparison, config.format)
    if config.format == "table":
        from loratune.console import say

        say(f"everything lies in {folder}: report.html, comparison.md, comparison.json")


def quiet_profiler() -> None:
    """Torch's profiler, which counts memory, announces itself on stderr unless told before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def _options(config: Config, given: set[str]) -> Options:
    from loratune.compare.options import Options, parse_part

    seeds = config.compare.seeds if config.seeds is None else config.seeds
    errors = [
        ConfigError(f"{value} is out of range", where=key, fix="use 1 to 1000")
        for key, value in [("seeds", seeds), ("processes", config.processes)]
        if not 1 <= value <= 1000
    ]
    part = parse_part(config.part)
    if part[1] > 1 and "out" not in given:
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
        folders=tuple(UserRecipes.folders),
    )


def _told_on_stderr(active: bool) -> Any:
    """Progress goes to stderr where the result goes to a program."""
    import contextlib
    import sys

    return contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext()


def _print(comparison: Comparison, form: str) -> None:
    from loratune.compare import tables
    from loratune.files import to_json

    if form == "json":
        print(to_json(comparison.to_dict()), end="")
    elif form == "md":
        print(tables.markdown(comparison), end="")
    elif form == "csv":
        print(tables.csv(comparison), end="")
    else:
        from loratune.console import console, say
        from loratune.counting.tables import to_rich

        for grid in tables.screen(comparison):
            console().print(to_rich(grid))
        for line in comparison.findings:
            say(f"- {line}")
