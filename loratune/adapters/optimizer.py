"""What trains, and AdamW over it: the rule of every variant that has no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class OptimizerSettings:
    """What the trainer asks of an optimizer; ``lr`` is the variant's base learning rate."""

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None
    fused: bool = False


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that trains, in the model's order, each once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def is_bias_or_norm(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a bias or belongs to a normalisation layer: never decayed."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    return attribute == "bias" or "norm" in type(owner).__name__.lower()


def decayed_and_plain_groups(model: nn.Module, settings: OptimizerSettings) -> list[ParamGroup]:
    """One group with weight decay and one without, at one learning rate; empty ones left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trainable_parameters(model):
        (plain if is_bias_or_norm(model, name) else decayed).append(parameter)
    groups = [
        {"name": "adapter", "params": decayed, "weight_decay": settings.weight_decay},
        {"name": "no_decay", "params": plain, "weight_decay": 0.0},
    ]
    return [{**group, "lr": settings.lr} for group in groups if group["params"]]


def adamw(groups: list[ParamGroup], settings: OptimizerSettings) -> torch.optim.AdamW:
    """PyTorch's AdamW over parameter groups."""
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        eps=1e-8 if settings.eps is None else settings.eps,
        fused=settings.fused or None,
    )
