"""``loratune train``: adapt a model."""

from __future__ import annotations

import os

from loratune.cli.recorded import recorded_recipe
from loratune.config.schema import RunConfig, Stage
from loratune.errors import ConfigError
from loratune.runs.resume_setting import AUTO
from loratune.runs.run_dir import RunDir

Config = RunConfig


def run(config: RunConfig, overrides: list[str]) -> None:
    """Run the recipe, or continue a run's own recipe with ``resume=DIR``.

    Under torchrun (or a cluster that sets its variables) this process is one of several.
    """
    config = recorded_recipe(config, overrides)
    check_rows(config)
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from loratune.pipeline.launch import join

        join(config)
        return
    _check_folder(config)
    if config.launch.nproc > 1:
        from loratune.pipeline.launch import launch

        launch(config)
        return
    from loratune.pipeline.run import run

    run(config)


def check_rows(config: RunConfig) -> None:
    """Rows that nobody named are missed before torch is imported.

    Raises:
        ConfigError: if the recipe trains and names none.
    """
    if Stage.train in config.stages and config.data.path is None:
        raise ConfigError(
            "there are no rows to train on", where="data.path", fix="set data.path=FILE"
        )


def _check_folder(config: RunConfig) -> None:
    """A folder that is taken or cannot be written is found before torch is imported."""
    if config.resume in (None, AUTO):
        RunDir.check(config)
