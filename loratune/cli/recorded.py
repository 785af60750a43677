"""A run's own recipe as the starting point of a later command."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from loratune.config.command_line import CommandLine
from loratune.config.convert import apply_overrides, from_plain, read_recipe
from loratune.config.schema import RunConfig
from loratune.config.settings import GROUPS
from loratune.runs.run_dir import RunDir, resumed_run

ConfigType = TypeVar("ConfigType", bound=RunConfig)


def recorded_recipe(
    config: ConfigType, command_line: CommandLine, run: str | None = None
) -> ConfigType:
    """The recipe recorded in a run folder with the command line's values on top.

    Where the command line chooses groups (``recipe=...``), or names no run, the composed
    configuration stands; the drift check then compares it with the recorded one.

    Args:
        config: as composed.
        command_line: the words it was composed with.
        run: the run folder; by default the one that ``resume=DIR`` names.

    Raises:
        ConfigError: if the folder has no recipe, or a word does not fit it.
    """
    folder = run or resumed_run(config)
    if folder is None or command_line.keys & set(GROUPS):
        return config
    values = read_recipe(RunDir(Path(folder)).recipe)
    return from_plain(apply_overrides(values, command_line.settings), type(config))


def names_base(keys: set[str], run: str | None) -> bool:
    """Whether the recipe's ``model`` is meant: chosen by these keys, or recorded in a run."""
    return run is not None or bool(keys & {"model", "model.path", "recipe"})
