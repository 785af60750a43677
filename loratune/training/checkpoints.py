"""The checkpoints of a run: saving its state, going on from it, keeping the best adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from loratune.errors import TrainingError
from loratune.models.fingerprint import tensors_fingerprint
from loratune.runs import processes
from loratune.runs.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    rotate,
    save_checkpoint,
    set_aside_later,
)
from loratune.runs.records import sync_lines, truncate_after
from loratune.runs.run_dir import RunDir
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.state import Progress, capture, load_adapter_state, restore


class Checkpoints:
    """What one run saves of itself.

    Args:
        wrapped: the model with its adapters.
        optimizer: over what trains.
        run_dir: the run's folder.
        facts: what every checkpoint records about the run.
        keep: number of newest checkpoints that stay; the best and the last always do.

    Attributes:
        progress: where the run stands.

    Raises:
        StorageError: if the disk is too small for them.
    """

    def __init__(
        self,
        wrapped: WrappedModel,
        optimizer: torch.optim.Optimizer,
        run_dir: RunDir,
        facts: dict[str, Any],
        keep: int,
    ) -> None:
        guards.check_disk_space(wrapped.model, run_dir.path, keep)
        self.wrapped, self.optimizer, self.run_dir = wrapped, optimizer, run_dir
        self.facts, self.keep = facts, keep
        self.progress = Progress(initial=guards.value_hashes(wrapped.model))

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a verified checkpoint, or begin; drop what an earlier start wrote since."""
        if checkpoint is not None:
            self.progress = restore(self.wrapped, self.optimizer, checkpoint)
        if processes.is_main():
            for path in (self.run_dir.metrics, self.run_dir.timings):
                truncate_after(path, self.progress.step)
            set_aside_later(self.run_dir.checkpoints, self.progress.step)
            self._rotate()

    def save(self) -> None:
        """Publish a checkpoint of this step, then drop old ones."""
        progress = self.progress
        guards.check_finite(self.wrapped.model, progress.step)
        tensors = capture(self.wrapped, self.optimizer)
        self._check_agreement(tensors["adapter"])
        if processes.is_main():
            sync_lines(self.run_dir.metrics)  # its lines belong to the checkpoint
            folder = self.run_dir.checkpoints
            save_checkpoint(folder, progress.step, tensors, asdict(progress), self.facts)
            self._rotate()
        processes.barrier()

    def load_best(self) -> int:
        """Put the best adapter, or the last where nothing was evaluated, into the model.

        Returns:
            The step that it is of.
        """
        step = self.progress.best_step or self.progress.step
        if step != self.progress.step:
            path = checkpoint_path(self.run_dir.checkpoints, step)
            load_adapter_state(self.wrapped, load_checkpoint(path))
        return step

    def _rotate(self) -> None:
        rotate(self.run_dir.checkpoints, self.keep, {self.progress.best_step, self.progress.step})

    def _check_agreement(self, adapter: Mapping[str, Tensor]) -> None:
        """All processes hold the same adapter, or nobody knows which one to save."""
        if not processes.is_distributed():
            return
        if len(set(processes.gather(tensors_fingerprint(adapter)))) > 1:
            where = f"step {self.progress.step}"
            raise TrainingError("the processes hold different adapters", where=where)
