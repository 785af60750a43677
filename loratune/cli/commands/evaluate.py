"""``loratune evaluate``: measure base and adapted model side by side."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli.formats import TableOrJson
from loratune.cli.recorded import recorded_recipe
from loratune.cli.required import adapter_folder
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and the run whose adapter to measure."""

    run: str | None = None
    """A run folder: its adapter, base and evaluation rows are taken, unless overridden."""
    format: TableOrJson = TableOrJson.table
    """table or json."""


def run(config: Config, command_line: CommandLine) -> None:
    """Measure the adapter of ``run=DIR``, or of ``adapter_path=DIR`` on ``model.path=DIR``."""
    folder = adapter_folder(config.run, config.adapter_path)
    config = recorded_recipe(config, command_line, config.run)
    from loratune.pipeline import commands

    commands.evaluate_adapter(config, folder, command_line.keys)
