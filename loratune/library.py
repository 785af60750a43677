"""loratune as a library: adapt any module in three lines.

```
import loratune
wrapped = loratune.wrap(model, "lora", targets=["q_proj", "v_proj"], rank=16)
optimizer = loratune.optimizer(wrapped, lr=2e-4)
```
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loratune.adapters.optimizer import OptimizerSettings
from loratune.adapters.registry import adapter_class, config_class
from loratune.config.schema import TargetsConfig
from loratune.errors import raise_together
from loratune.models.probes.layers import unusable_layers
from loratune.surgery import WrappedModel, wrap_model


def wrap(
    model: nn.Module,
    variant: str = "lora",
    *,
    targets: str | list[str] = "attention_qv",
    seed: int | None = 0,
    text_only: bool = False,
    **settings: Any,
) -> WrappedModel:
    """Freeze ``model`` and swap its target layers for adapters, in place.

    Args:
        model: any ``nn.Module``.
        variant: name of a folder in ``loratune/adapters``, such as lora.
        targets: a role word, a list of module names, or a regular expression.
        seed: of the random start; ``None`` draws from torch's current state.
        text_only: leave out (or refuse by name) layers that a loss on text never reaches, such as
            a tower that reads images, as ``loratune train`` does: a pass through a small copy of
            a transformers model tells.  What your own loss reaches, only you know.
        **settings: the variant's own settings: rank, alpha, dropout, init, ...

    Raises:
        LoratuneError: if a setting or a target is wrong, or a setting has no effect.
    """
    config = config_class(variant)(**settings)
    raise_together(config.useless_settings())
    unusable = unusable_layers(model) if text_only else None
    return wrap_model(model, config, TargetsConfig(modules=targets), seed=seed, unusable=unusable)


def optimizer(
    wrapped: WrappedModel, lr: float | None = None, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """The variant's own optimizer over what trains; ``lr`` defaults to the variant's."""
    rate = wrapped.config.lr if lr is None else lr
    settings = OptimizerSettings(lr=rate, weight_decay=weight_decay)
    return adapter_class(wrapped.config.variant).make_optimizer(
        wrapped.model, wrapped.config, settings
    )
