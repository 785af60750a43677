"""The checkpoints of a run: saving its state, going on from it, keeping the best adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.errors import TrainingError, raise_together
from loratune.models.fingerprint import hashes_in_memory, tensors_fingerprint
from loratune.runs import processes
from loratune.runs.checkpoint import (
    Checkpoint,
    checkpoint_path,
    has_checkpoint,
    load_checkpoint,
    rotate,
    save_checkpoint,
    set_aside_later,
)
from loratune.runs.records import sync_lines, truncate_after
from loratune.runs.run_dir import RunDir
from loratune.runs.sharded import gather_for_main, is_shared_out, own_part, part_of
from loratune.surgery import WrappedModel
from loratune.training import guards
from loratune.training.state import (
    Progress,
    adapter_tensors,
    capture,
    load_adapter_state,
    restore,
)


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
        self._publish(tensors)
        processes.barrier()

    def _publish(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The main process writes; what is shared out comes to it one tensor at a time."""
        folder, step = self.run_dir.checkpoints, self.progress.step
        is_there = processes.is_main() and has_checkpoint(folder, step)
        is_there = processes.broadcast(is_there)
        if not processes.is_main():
            if not is_there:
                gather_for_main(one for group in tensors.values() for one in group.values())
            return
        sync_lines(self.run_dir.metrics)  # its lines belong to the checkpoint
        if not is_there:
            save_checkpoint(folder, step, tensors, asdict(self.progress), self.facts)
        self._rotate()

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
        """All processes hold the same of what all hold, or nobody knows which one to save."""
        if not processes.is_distributed():
            return
        whole = {name: tensor for name, tensor in adapter.items() if not is_shared_out(tensor)}
        if len(set(processes.gather(tensors_fingerprint(whole)))) > 1:
            where = f"step {self.progress.step}"
            raise TrainingError("the processes hold different adapters", where=where)


def check_as_saved(wrapped: WrappedModel, path: Path) -> None:
    """Stop every process if rows that one of them holds are no longer those of its checkpoint.

    Of a tensor that the processes share out, no other has these rows: what a process's memory lost
    since they were saved, only the checkpoint tells.

    Args:
        wrapped: the model, with the adapter of this checkpoint in it.
        path: the checkpoint.

    Raises:
        TrainingError: one line for each process that holds other rows.
    """
    own = {
        name: tensor for name, tensor in adapter_tensors(wrapped).items() if is_shared_out(tensor)
    }
    if not own:
        return
    saved = load_checkpoint(path).tensors["adapter"]
    here = hashes_in_memory({name: own_part(tensor) for name, tensor in own.items()})
    there = hashes_in_memory({name: part_of(saved[name], tensor) for name, tensor in own.items()})
    wrong = [name for name in own if here[name] != there[name]]
    raise_together(
        TrainingError(
            f"{len(names)} of {len(own)} tensors are not as rank {rank} saved them: '{names[0]}'",
            where=str(path),
            fix="nothing was published; resume=auto goes on from the checkpoint",
        )
        for rank, names in enumerate(processes.gather(wrong))
        if names
    )
