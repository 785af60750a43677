"""The optimizer of a training and its learning rate: at its peak, and at every step."""

from __future__ import annotations

import math

import torch
from torch import nn

from loratune.adapters.config import AdapterConfig
from loratune.adapters.optimizer import OptimizerSettings, trainable_parameters
from loratune.adapters.registry import adapter_class
from loratune.config.schema import Schedule, TrainerConfig
from loratune.runs.sharded import is_shared_out


def learning_rate(trainer: TrainerConfig, adapter: AdapterConfig) -> float:
    """``trainer.lr`` if set, else the variant's own rate times ``trainer.lr_scale``."""
    return adapter.lr * trainer.lr_scale if trainer.lr is None else trainer.lr


def make_optimizer(
    model: nn.Module, adapter: AdapterConfig, trainer: TrainerConfig
) -> torch.optim.Optimizer:
    """The variant's optimizer; each group remembers its peak rate as ``peak_lr``."""
    device = next(parameter.device for _, parameter in trainable_parameters(model))
    settings = OptimizerSettings(
        lr=learning_rate(trainer, adapter),
        weight_decay=trainer.weight_decay,
        betas=(trainer.betas[0], trainer.betas[1]),
        eps=trainer.eps,
        fused=device.type == "cuda",
    )
    optimizer = adapter_class(adapter.variant).make_optimizer(model, adapter, settings)
    _split_mixed_groups(optimizer)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def _split_mixed_groups(optimizer: torch.optim.Optimizer) -> None:
    """Put what the processes share out into groups of its own: torch updates a group at once."""
    for group in list(optimizer.param_groups):
        shared_out = [one for one in group["params"] if is_shared_out(one)]
        if 0 < len(shared_out) < len(group["params"]):
            group["params"] = [one for one in group["params"] if not is_shared_out(one)]
            name = f"{group.get('name', '')} (sharded)"
            optimizer.add_param_group({**group, "params": shared_out, "name": name})


def group_lines(optimizer: torch.optim.Optimizer) -> list[str]:
    """Name, size, peak rate and decay of every group, one line each."""
    return [
        f"  group {group.get('name', '')}: "
        f"{sum(parameter.numel() for parameter in group['params']):,} parameters, "
        f"lr {group['peak_lr']:g}, decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]


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
