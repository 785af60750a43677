"""``loratune export``: an adapter in the form that another tool reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune.cli.inputs import adapter_folder, names_base, recorded_recipe
from loratune.config.command_line import CommandLine
from loratune.config.schema import ExportFormat, RunConfig
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and what to export."""

    run: str | None = None
    """A run folder: its adapter and base are taken."""
    format: ExportFormat = ExportFormat.peft
    """peft, merged, portable, lora, compact, gguf or gguf-lora."""
    out: str | None = None
    """The folder to write; null is export in the run folder, or here."""
    push: str | None = None
    """USER/NAME on the hub, to upload the export to."""
    push_private: bool = True
    """Only you may read the repository; false makes a new one public."""
    push_dry_run: bool = False
    """Only say which files ``push`` would upload."""


def run(config: Config, command_line: CommandLine) -> None:
    """Export the adapter of ``run=DIR``, or of ``adapter_path=DIR``."""
    if config.push_dry_run and config.push is None:
        raise ConfigError("nothing to push", where="push_dry_run", fix="set push=USER/NAME")
    repository, private, dry_run = config.push, config.push_private, config.push_dry_run
    folder = adapter_folder(config.run, config.adapter_path)
    out, form = Path(config.out or Path(config.run or ".") / "export"), config.format
    config = recorded_recipe(config, command_line, config.run)
    from loratune.pipeline import commands, hub

    if repository is not None:
        hub.check_repository(repository)
    base_named = names_base(command_line.keys, config.run)
    commands.export_adapter(config, folder, out, form, base_named=base_named)
    if repository is not None:
        hub.push(out, repository, private=private, dry_run=dry_run)
