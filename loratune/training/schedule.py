"""The learning rate at every step: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math

import torch

from loratune.config.schema import Schedule, TrainerConfig


def schedule_factor(step: int, total: int, trainer: TrainerConfig) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (from 0) of ``total``.

    Rises linearly over the warm-up (step 0 already moves), then stays, or falls to zero along a
    line or half a cosine.
    """
    warmup = warmup_steps(total, trainer)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if trainer.schedule is Schedule.constant:
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    if trainer.schedule is Schedule.linear:
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def warmup_steps(total: int, trainer: TrainerConfig) -> int:
    """Steps of the warm-up: ``warmup_steps``, or ``warmup_ratio`` of all steps where that is 0."""
    return trainer.warmup_steps or int(trainer.warmup_ratio * total)


def warmup_warning(total: int, trainer: TrainerConfig) -> str:
    """What to say if the warm-up is as long as the training, else an empty string."""
    if warmup_steps(total, trainer) < total or total == 0:
        return ""
    return f"warm-up takes all {total} steps: the learning rate never reaches lr"


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate by the same factor, so that LoRA+'s ratio holds."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
