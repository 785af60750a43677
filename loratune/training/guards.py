"""No silent no-op: everything that should train must get gradients and must move."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loratune.adapters.optimizer import trainable_parameters
from loratune.errors import StorageError, TrainingError
from loratune.files import free_bytes

# A's gradient is exactly zero while B is zero, so two steps with a learning rate say nothing.
STEPS_TO_JUDGE = 3


def refuse_nothing_trainable(model: nn.Module) -> None:
    """Stop before the first step if nothing would train.

    Raises:
        TrainingError: naming how many parameters there are.
    """
    if not trainable_parameters(model):
        count = sum(parameter.numel() for parameter in model.parameters())
        raise TrainingError(
            f"0 trainable of {count:,} parameters", where="targets", fix="choose target modules"
        )


def refuse_zero_rate(rates: list[float]) -> None:
    """Stop before the first step if every group's learning rate is zero.

    Raises:
        TrainingError: always with that cause.
    """
    if not any(rates):
        raise TrainingError(
            "every learning rate is zero: nothing would move",
            where="trainer.lr",
            fix="set it above 0",
        )


def refuse_small_disk(model: nn.Module, folder: Path, keep: int) -> None:
    """Stop before the first step if the checkpoints that will be kept cannot fit.

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
    """Hex sha256 of every trainable tensor's value, to see later whether it moved."""
    return {name: _hash(parameter) for name, parameter in trainable_parameters(model)}


def _hash(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


class GradientWatch:
    """Remembers which trainable tensors have ever had a non-zero gradient."""

    def __init__(self, seen: Mapping[str, bool] | None = None, steps: int = 0) -> None:
        self.seen = dict(seen or {})
        self.steps = steps

    def look(self, model: nn.Module, lr_factor: float) -> None:
        """After a step: note gradients; judge once enough steps had a learning rate.

        Raises:
            TrainingError: naming the tensors that never had a gradient.
        """
        if self.steps >= STEPS_TO_JUDGE or not lr_factor:
            return
        self.steps += 1
        for name, parameter in trainable_parameters(model):
            had = parameter.grad is not None and bool(parameter.grad.any())
            self.seen[name] = self.seen.get(name, False) or had
        if self.steps == STEPS_TO_JUDGE:
            self._judge()

    def _judge(self) -> None:
        dead = [name for name, had in self.seen.items() if not had]
        if dead:
            listed = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
            raise TrainingError(
                f"{len(dead)} of {len(self.seen)} adapter tensors had no gradient: {listed}",
                where=f"after step {self.steps}",
                fix="those layers do not reach the loss; choose other targets.modules",
            )


def refuse_unmoved(model: nn.Module, initial: Mapping[str, str], steps: int) -> None:
    """At the end: every trainable tensor must differ from its start.

    Raises:
        TrainingError: naming the tensors that are bitwise as they began.
    """
    if steps < STEPS_TO_JUDGE:
        return
    still = [name for name, value in value_hashes(model).items() if initial.get(name) == value]
    if still:
        listed = ", ".join(still[:3]) + (", ..." if len(still) > 3 else "")
        raise TrainingError(
            f"{len(still)} trainable tensors never moved: {listed}",
            where="end of training",
            fix="raise trainer.lr, or choose other targets.modules",
        )


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Before anything is published: every trained tensor is finite.

    Raises:
        TrainingError: naming the first that is not.
    """
    for name, parameter in trainable_parameters(model):
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingError(
                f"training diverged: parameter {name} is not finite",
                where=f"step {step}",
                fix="lower trainer.lr; the last checkpoint is finite",
            )
