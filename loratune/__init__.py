"""loratune: fine-tune causal language models with LoRA, LoRA-FA, LoRA+ and VeRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from loratune.scoring.metric import AnswerScore, TextMetric
    from loratune.surgery import WrappedModel

__version__ = "0.1.0"
__all__ = ["__version__", "optimizer", "register_metric", "wrap"]


# Thin, so that `import loratune` (and with it `loratune --help`) never imports torch.


def wrap(model: nn.Module, variant: str = "lora", **settings: Any) -> WrappedModel:
    """Freeze ``model`` and swap its target layers for adapters; see ``loratune.library.wrap``."""
    from loratune import library

    return library.wrap(model, variant, **settings)


def optimizer(wrapped: WrappedModel, **settings: Any) -> torch.optim.Optimizer:
    """The variant's own optimizer over what trains; see ``loratune.library.optimizer``."""
    from loratune import library

    return library.optimizer(wrapped, **settings)


def register_metric(name: str, metric: TextMetric | AnswerScore, label: str = "") -> None:
    """Add a metric for ``evaluate.metrics``; see ``loratune.scoring.registry``."""
    from loratune.scoring import registry

    registry.register_metric(name, metric, label)
