"""``loratune merge``: base + adapter as one plain model folder, with proof."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.cli.inputs import adapter_folder, names_base, recorded_recipe
from loratune.config.command_line import CommandLine
from loratune.config.schema import MergeBase, Quantize, RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and what to merge."""

    run: str | None = None
    """A run folder: its adapter and base are taken."""
    adapter_path: Any = None
    """An adapter folder, or a list of them, summed in fp32 once."""
    out: str | None = None
    """The folder to write; null is merged in the run folder, or here."""
    base: MergeBase | None = None
    """Where the base was quantized: dequantized (the weights that training saw) or original."""
    requantize: Quantize | None = None
    """Write the merged model in nf4, fp4 or int8 once more."""


def run(config: Config, command_line: CommandLine) -> None:
    """Merge the adapter of ``run=DIR``, or of ``adapter_path=DIR``, into its base."""
    several = config.adapter_path if isinstance(config.adapter_path, list) else None
    one = None if several else config.adapter_path
    folders = [Path(str(path)) for path in several or [adapter_folder(config.run, one)]]
    out = Path(config.out or Path(config.run or ".") / "merged")
    config = recorded_recipe(config, command_line, config.run)
    config.merge.base = config.base or config.merge.base
    config.merge.requantize = config.requantize or config.merge.requantize
    from loratune.pipeline import commands

    base_named = names_base(command_line.keys, config.run)
    commands.merge_adapters(config, folders, out, base_named=base_named)
