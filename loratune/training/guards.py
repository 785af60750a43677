"""No silent no-op: everything that should train must get gradients and must move."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from loratune.adapters.optimizer import trainable_parameters
from loratune.errors import StorageError, TrainingError
from loratune.files import free_bytes
from loratune.runs.sharded import anywhere, gathered, own_part
from loratune.training.state import Progress

# A's gradient is exactly zero while B is zero, so two steps with a learning rate say nothing.
STEPS_TO_JUDGE = 3


def require_trainable(model: nn.Module) -> None:
    """Stop before the first step if nothing would train.

    Raises:
        TrainingError: naming how many parameters there are.
    """
    if not trainable_parameters(model):
        count = sum(parameter.numel() for parameter in model.parameters())
        raise TrainingError(
            f"0 trainable of {count:,} parameters", where="targets", fix="choose target modules"
        )


def require_learning_rate(optimizer: torch.optim.Optimizer) -> None:
    """Stop before the first step if every group's learning rate is zero.

    Raises:
        TrainingError: always with that cause.
    """
    if not any(group["peak_lr"] for group in optimizer.param_groups):
        raise TrainingError(
            "every learning rate is zero: nothing would move",
            where="trainer.lr",
            fix="set it above 0",
        )


def check_disk_space(model: nn.Module, folder: Path, keep: int) -> None:
    """Stop before the first step if the checkpoints do not fit on the disk.

    A checkpoint holds the adapter and AdamW's two moments; the best, the last and the one being
    written come on top of the ``keep`` newest.

    Raises:
        StorageError: with the bytes needed and the bytes free.
    """
    trained = sum(p.numel() * p.element_size() for _, p in trainable_parameters(model))
    needed, free = 3 * trained * (keep + 2), free_bytes(folder)
    if needed > free:
        raise StorageError(
            f"checkpoints need about {needed:,} bytes, {free:,} are free",
            where=str(folder),
            fix="free some disk space, or choose another out=DIR",
        )


def value_hashes(model: nn.Module) -> dict[str, str]:
    """Hex sha256 of every trainable tensor's value, to see later whether it moved; collective."""
    return {name: _hash(gathered(parameter)) for name, parameter in trainable_parameters(model)}


def _hash(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def watch_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """After a step: note which tensors have ever had a gradient; judge after enough steps.

    Steps without a learning rate say nothing and are not counted.

    Raises:
        TrainingError: naming the tensors that never had a gradient.
    """
    moving = any(group["lr"] for group in optimizer.param_groups)
    if progress.watched_steps >= STEPS_TO_JUDGE or not moving:
        return
    progress.watched_steps += 1
    seen = progress.seen_gradient
    trained = trainable_parameters(model)
    gradients = {name: own_part(p.grad) for name, p in trained if p.grad is not None}
    moved = set(anywhere(name for name, gradient in gradients.items() if bool(gradient.any())))
    for name, _ in trained:
        seen[name] = seen.get(name, False) or name in moved
    dead = [name for name, had_gradient in seen.items() if not had_gradient]
    if dead and progress.watched_steps == STEPS_TO_JUDGE:
        raise TrainingError(
            f"{len(dead)} of {len(seen)} adapter tensors had no gradient: {_listed(dead)}",
            where=f"after step {progress.watched_steps}",
            fix="those layers do not reach the loss; choose other targets.modules",
        )


def require_moved(model: nn.Module, initial: Mapping[str, str], steps: int) -> None:
    """At the end: every trainable tensor must differ from its start.

    Raises:
        TrainingError: naming the tensors that are bitwise as they began.
    """
    if steps < STEPS_TO_JUDGE:
        return
    still = [name for name, value in value_hashes(model).items() if initial.get(name) == value]
    if still:
        raise TrainingError(
            f"{len(still)} trainable tensors never moved: {_listed(still)}",
            where="end of training",
            fix="raise trainer.lr, or choose other targets.modules",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_finite(model: nn.Module, step: int) -> None:
    """Before anything is published: every trained tensor is finite, on every process.

    Raises:
        TrainingError: naming the first that is not.
    """
    parts = {name: own_part(parameter) for name, parameter in trainable_parameters(model)}
    broken = anywhere(name for name, part in parts.items() if not bool(part.isfinite().all()))
    if broken:
        raise TrainingError(
            f"training diverged: parameter {broken[0]} is not finite",
            where=f"step {step}",
            fix="lower trainer.lr; the last checkpoint is finite",
        )
