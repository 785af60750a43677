"""``loratune train``: adapt a model."""

from __future__ import annotations

import os

from loratune.cli.inputs import recorded_recipe, require_metrics, require_rows
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig, Stage
from loratune.pipeline.slurm import rank_variables
from loratune.runs.run_dir import AUTO, RunDir

Config = RunConfig


def run(config: RunConfig, command_line: CommandLine) -> None:
    """Run the recipe, or continue a run's own recipe with ``resume=DIR``.

    Under torchrun, or srun with several tasks, this process is one of several.
    """
    config = recorded_recipe(config, command_line)
    os.environ.update(rank_variables(os.environ, config.launch.nproc))
    require_rows(config)
    if Stage.evaluate in config.stages:
        require_metrics(config)
    if config.adapter_path is not None:
        from loratune.pipeline.continuing import check_continued

        check_continued(config, command_line.keys)
    if _is_one_of_several():
        from loratune.pipeline.joining import join

        join(config)
        return
    if config.resume in (None, AUTO):  # a folder that is taken stops the run before torch loads
        RunDir.check(config)
    if config.launch.nproc > 1 or config.launch.max_restarts:
        from loratune.pipeline.launch import launch

        launch(config)
        return
    from loratune.pipeline.run import run

    run(config)


def _is_one_of_several() -> bool:
    """Whether a launcher started this process; torchrun may have left it the only one for now."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    return "RANK" in os.environ and several
