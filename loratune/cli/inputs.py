"""What a command starts from: a run's own recipe, an adapter, rows to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from loratune.config.command_line import CommandLine
from loratune.config.convert import apply_overrides, from_plain, read_recipe
from loratune.config.mixture import training_paths
from loratune.config.schema import RunConfig, Stage
from loratune.config.settings import GROUPS
from loratune.errors import ConfigError
from loratune.runs.run_dir import RunDir, resumed_run
from loratune.scoring import registry as metrics

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
    values = read_recipe(RunDir.open(folder).recipe)
    return from_plain(apply_overrides(values, command_line.settings), type(config))


def names_base(keys: set[str], run: str | None) -> bool:
    """Whether the recipe's ``model`` is meant: chosen by these keys, or recorded in a run."""
    return run is not None or bool(keys & {"model", "model.path", "recipe"})


def require_metrics(config: RunConfig) -> None:
    """Stop before torch is imported if a metric does not exist, or what computes it is missing.

    Raises:
        ConfigError: if one does not.
    """
    if config.evaluate.generate:
        metrics.require_metrics(config.evaluate.metrics)


def require_rows(config: RunConfig) -> None:
    """Stop before torch is imported if the recipe trains and names no rows.

    Raises:
        ConfigError: if it does.
    """
    if Stage.train in config.stages and not training_paths(config.data):
        cause = "there are no rows to train on"
        raise ConfigError(cause, where="data.path", fix="set data.path=FILE")


def adapter_folder(run: str | None, adapter_path: str | None) -> Path:
    """The adapter that ``run=DIR`` or ``adapter_path=DIR`` names.

    Raises:
        ConfigError: if neither or both are set, or the run has no adapter.
    """
    if (run is None) == (adapter_path is None):
        fix = "set run=DIR or adapter_path=DIR"
        raise ConfigError("which adapter?", where="run, adapter_path", fix=fix)
    if adapter_path is not None:
        return Path(adapter_path)
    run_dir = RunDir.open(str(run))
    if not run_dir.adapter.is_dir():
        fix = f"finish it: loratune train resume={run_dir.path}"
        raise ConfigError("the run has no adapter yet", where=str(run_dir.path), fix=fix)
    return run_dir.adapter


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Check how answers are to be drawn.

    Raises:
        ConfigError: for a number out of range.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} is too small", where="max_new_tokens", fix=">= 1")
    if not temperature >= 0:
        raise ConfigError(f"{temperature} is negative", where="temperature", fix=">= 0")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{top_p} is out of range", where="top_p", fix="use (0, 1]")
