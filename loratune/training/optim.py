"""The optimizer of a training: the variant's own, with the recipe's rates."""

from __future__ import annotations

import torch
from torch import nn

from loratune.adapters.config import AdapterConfig
from loratune.adapters.optimizer import OptimizerSettings, trainable_parameters
from loratune.adapters.registry import adapter_class
from loratune.config.schema import TrainerConfig


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
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def group_lines(optimizer: torch.optim.Optimizer) -> list[str]:
    """Name, size, peak rate and decay of every group, one line each."""
    return [
        f"  group {group.get('name', '')}: "
        f"{sum(parameter.numel() for parameter in group['params']):,} parameters, "
        f"lr {group['peak_lr']:g}, decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]
