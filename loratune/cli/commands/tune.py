"""``loratune tune``: find the learning rate of one variant and write a recipe with it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.errors import ConfigError

_OF_THE_SEARCH = {
    "recipe", "adapter", "out", "lr_grid", "ratio_grid", "processes", "retry", "compare",
    "trainer.lr", "trainer.lr_scale", "adapter.lr",
}  # fmt: skip
"""Settings that the written recipe replaces or does not need."""


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and how to search; ``out`` is the recipe file to write."""

    lr_grid: list[float] | None = None
    """Learning rates to try; null takes compare.lr_points rates around the variant's own."""
    ratio_grid: list[float] | None = None
    """Values of the variant's second setting (LoRA+'s ratio) to try; null tries its own few."""
    processes: int = 1
    """Processes that share the work here, one thread each."""
    retry: bool = False
    """Do failed trials again."""


def run(config: Config, command_line: CommandLine) -> None:
    """Search, print what was tried, and write the recipe."""
    if not 1 <= config.processes <= 1000:
        cause = f"{config.processes} is out of range"
        raise ConfigError(cause, where="processes", fix="use 1 to 1000")
    target = Path(config.out or f"recipes/recipe/{config.name}_tuned.yaml")
    config = replace(config, out=None)  # the search keeps its work where compare does
    from loratune.compare.settings import Options
    from loratune.compare.tune import curve, tune

    options = Options(
        lr_grid=config.lr_grid,
        ratio_grid=config.ratio_grid,
        processes=config.processes,
        retry=config.retry,
        folders=command_line.folders,
    )
    tuned = tune(config, options, command_line.recipe, target)
    for line in curve(tuned.trials):
        say(line)
    rate = f"lr {tuned.point.lr:g}"
    if tuned.point.ratio is not None:
        rate += f", {tuned.axis} {tuned.point.ratio:g}"
    say(f"best: {rate}, dev loss {tuned.loss:.4f}")
    if tuned.at_edge:
        say("note: it is the last rate tried; give a wider lr_grid")
    searched = {*_OF_THE_SEARCH, f"adapter.{tuned.axis}"}
    others = [
        shlex.quote(str(override.input_line))
        for override in command_line.settings
        if not override.key_or_group.startswith("compare.")
        and override.key_or_group not in searched
    ]
    say(f"wrote {tuned.recipe}")
    say("use it: " + " ".join([f"loratune train recipe={target.stem}", *others]))
