"""``loratune tune``: find the learning rate of one variant and write a recipe with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune.cli.commands.compare import quiet_profiler
from loratune.config.recipes.folders import UserRecipes
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, raise_together

_OF_THE_SEARCH = (
    "recipe=", "adapter=", "out=", "compare.", "lr_grid=", "ratio_grid=", "processes=", "retry=",
    "trainer.lr=", "trainer.lr_scale=", "adapter.lr=",
)  # fmt: skip


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


def run(config: Config, overrides: list[str]) -> None:
    """Search, print what was tried, and write the recipe."""
    raise_together(_problems(config))
    target = Path(config.out or f"recipes/recipe/{config.name}_tuned.yaml")
    config.out = None  # the search keeps its work where compare does
    quiet_profiler()
    from loratune.compare.options import Options
    from loratune.compare.tune import curve, tune
    from loratune.console import say

    options = Options(
        lr_grid=config.lr_grid,
        ratio_grid=config.ratio_grid,
        processes=config.processes,
        retry=config.retry,
        folders=tuple(UserRecipes.folders),
    )
    found = tune(config, options, _chosen_recipe(overrides), target)
    for line in curve(found.trials):
        say(line)
    rate = f"lr {found.point.lr:g}"
    if found.point.ratio is not None:
        rate += f", {found.axis} {found.point.ratio:g}"
    say(f"best: {rate}, dev loss {found.loss:.4f}")
    if found.at_edge:
        say("note: it is the last rate tried; give a wider lr_grid")
    searched = (*_OF_THE_SEARCH, f"adapter.{found.axis}=")
    others = [word for word in overrides if not word.lstrip("+").startswith(searched)]
    say(f"wrote {found.recipe}")
    say("use it: " + " ".join([f"loratune train recipe={target.stem}", *others]))


def _problems(config: Config) -> list[ConfigError]:
    if 1 <= config.processes <= 1000:
        return []
    fix = "use 1 to 1000"
    return [ConfigError(f"{config.processes} is out of range", where="processes", fix=fix)]


def _chosen_recipe(overrides: list[str]) -> str | None:
    """The recipe that the command line chose."""
    names = [word.partition("=")[2] for word in overrides if word.startswith("recipe=")]
    return names[-1] if names and names[-1] not in ("", "null") else None
