"""``loratune rewind``: a trained adapter's scale, swept, chosen and folded in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from loratune.cli.inputs import adapter_folder, names_base, recorded_recipe, require_metrics
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and which scales of its adapter to try."""

    run: str | None = None
    """A run folder: its adapter, base and evaluation rows are taken, unless overridden."""
    scales: list[float] = field(default_factory=lambda: [n / 10 for n in range(13)])
    """Scales to try: 0 is the base and 1 the adapter."""
    scale: float | None = None
    """The scale to write; null chooses by the evaluation rows and evaluate.retention."""
    keep: float = 0.99
    """With evaluate.retention: the smallest scale is chosen that keeps this share of the gain."""
    answers: bool = False
    """Answer the prompts at every scale too, for evaluate.metrics."""
    out: str | None = None
    """The folder to write; null is rewound in the run folder, or here."""


def run(config: Config, command_line: CommandLine) -> None:
    """Sweep the scale of the adapter of ``run=DIR``, or of ``adapter_path=DIR``."""
    folder = adapter_folder(config.run, config.adapter_path)
    out = Path(config.out or Path(config.run or ".") / "rewound")
    scales, scale, keep, answers = config.scales, config.scale, config.keep, config.answers
    if not scales:
        raise ConfigError("there is no scale to try", where="scales", fix="use scales=[0,0.5,1]")
    if not 0 < keep <= 1:
        raise ConfigError(f"{keep:g} is out of range", where="keep", fix="use (0, 1]")
    config = recorded_recipe(config, command_line, config.run)
    if answers:
        require_metrics(config)
    from loratune.pipeline.rewind import Sweep, rewind

    base_named = names_base(command_line.keys, config.run)
    rewind(config, folder, Sweep(scales, scale, keep, answers), out, base_named=base_named)
