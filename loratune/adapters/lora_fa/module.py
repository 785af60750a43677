"""LoRA-FA's layer (arXiv:2308.03303): LoRA with A frozen."""

from __future__ import annotations

import torch
from torch import nn

from loratune.adapters.base import LayerPlan
from loratune.adapters.config import AdapterConfig
from loratune.adapters.lora.module import LoRA
from loratune.adapters.lora_fa.config import LoRAFAConfig
from loratune.adapters.lora_fa.projection import FrozenFactor, ProjectedAdamW
from loratune.adapters.optimizer import OptimizerSettings


class LoRAFA(LoRA):
    """LoRA whose A stays at its initial value: only B trains.

    Autograd then needs h = A x (r numbers per token) for B's gradient, and never x.
    """

    def __init__(self, plan: LayerPlan, config: LoRAFAConfig) -> None:
        super().__init__(plan, config)
        self.lora_A.requires_grad_(False)

    @classmethod
    def make_optimizer(
        cls, model: nn.Module, config: AdapterConfig, settings: OptimizerSettings
    ) -> torch.optim.Optimizer:
        """AdamW on B, or with ``projected`` the closed-form gradient under the paper's AdamW."""
        assert isinstance(config, LoRAFAConfig)
        if not config.projected:
            return super().make_optimizer(model, config, settings)
        groups = cls.param_groups(model, config, settings)
        factors = {
            layer.lora_B: FrozenFactor(layer.lora_A, layer.scaling, layer.shape.name)
            for layer in model.modules()
            if isinstance(layer, cls)
        }
        return ProjectedAdamW(groups, factors, settings, config.kernel)
