"""Hydra takes launchers from this package only; the work is done in ``loratune.cli.ray_jobs``."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RayLauncher(Launcher):
    """Runs the jobs of a sweep on a Ray cluster (``hydra/launcher=ray``).

    Args:
        ray: ``init``, arguments of ``ray.init``; ``remote``, options of each job's task.
    """

    def __init__(self, ray: DictConfig) -> None:
        self.ray = ray

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.task_function = hydra_context, task_function
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run one batch of jobs; ``initial_job_idx`` is the number of its first."""
        from loratune.cli.ray_jobs import run_jobs

        return run_jobs(self, job_overrides, initial_job_idx)
