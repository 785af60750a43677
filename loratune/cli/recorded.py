"""A run as the starting point of a later command: its recipe, its adapter, its base."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from loratune.cli.hydra_app import given_keys
from loratune.config.convert import apply_overrides, from_plain, read_recipe
from loratune.config.schema import RunConfig
from loratune.config.settings import GROUPS
from loratune.errors import ConfigError
from loratune.runs.resume_setting import resumed_run
from loratune.runs.run_dir import RunDir

ConfigType = TypeVar("ConfigType", bound=RunConfig)


def recorded_recipe(config: ConfigType, overrides: list[str], run: str | None = None) -> ConfigType:
    """The recipe recorded in a run folder with the command line's values on top.

    Where the command line chooses groups (``recipe=...``), or names no run, the composed
    configuration stands; the drift check then compares it with the recorded one.

    Args:
        config: as composed.
        overrides: the words it was composed with.
        run: the run folder; by default the one that ``resume=DIR`` names.

    Raises:
        ConfigError: if the folder has no recipe, or a word does not fit it.
    """
    folder = Path(run) if run else resumed_run(config)
    if folder is None or given_keys(overrides) & set(GROUPS):
        return config
    values = read_recipe(RunDir(folder).recipe)
    return from_plain(apply_overrides(values, overrides), type(config))


def adapter_folder(run: str | None, adapter_path: str | None) -> Path:
    """The adapter that ``run=DIR`` or ``adapter_path=DIR`` names.

    Raises:
        ConfigError: if neither or both are named, or the run has none.
    """
    if (run is None) == (adapter_path is None):
        raise ConfigError(
            "which adapter?", where="run, adapter_path", fix="set run=DIR or adapter_path=DIR"
        )
    if run is None:
        return Path(str(adapter_path))
    run_dir = RunDir.open(run)
    if not run_dir.adapter.is_dir():
        raise ConfigError(
            "the run has no adapter yet",
            where=run,
            fix=f"finish it: loratune train resume={run}",
        )
    return run_dir.adapter


def is_base_named(overrides: list[str], run: str | None) -> bool:
    """Whether the recipe's ``model`` is meant: chosen by the user, or recorded in a run."""
    return run is not None or bool(given_keys(overrides) & {"model", "model.path", "recipe"})
