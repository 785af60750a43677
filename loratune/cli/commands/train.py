"""``loratune train``: adapt a model."""

from __future__ import annotations

from loratune.cli.recorded import recorded_recipe
from loratune.config.schema import RunConfig

Config = RunConfig


def run(config: RunConfig, overrides: list[str]) -> None:
    """Run the recipe, or continue a run's own recipe with ``resume=DIR``."""
    config = recorded_recipe(config, overrides)
    if config.launch.nproc > 1:
        from loratune.launch import launch

        launch(config)
        return
    from loratune import pipeline

    pipeline.run(config)
