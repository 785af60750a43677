"""``loratune export``: an adapter in the form that another tool reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune.cli.recorded import recorded_recipe
from loratune.cli.required import adapter_folder
from loratune.config.command_line import CommandLine
from loratune.config.schema import ExportFormat, RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and what to export."""

    run: str | None = None
    """A run folder: its adapter and base are taken."""
    format: ExportFormat = ExportFormat.peft
    """peft, merged, portable, lora or compact."""


def run(config: Config, command_line: CommandLine) -> None:
    """Export the adapter of ``run=DIR``, or of ``adapter_path=DIR``."""
    folder = adapter_folder(config.run, config.adapter_path)
    run_folder, out, form = config.run, config.out, config.format
    config = recorded_recipe(config, command_line, config.run)
    target = Path(out) if out else Path(run_folder or ".") / "export"
    from loratune.pipeline import commands

    commands.export_adapter(config, folder, target, form, command_line.keys)
