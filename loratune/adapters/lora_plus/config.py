"""LoRA+'s settings (arXiv:2402.12354): LoRA's model, other learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.adapters.config import check_learning_rate
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.training_form import ScaledLayer, TrainingForm, UpdateRule
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class LoRAPlusConfig(LoRAConfig):
    """LoRA whose B learns ``lr_ratio`` times faster than A."""

    variant: str = "lora_plus"
    lr: float = 5e-5
    lr_ratio: float = 16.0
    """Learning rate of B over that of A, at least 1; above 32 training tends to be unstable."""
    embedding_lr: float = 1e-6
    """Learning rate of both factors where an embedding is adapted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.lr_ratio) and self.lr_ratio >= 1):
            raise ConfigError(
                f"{self.lr_ratio} is out of range", where="adapter.lr_ratio", fix="use 1 to 32"
            )
        check_learning_rate(self.embedding_lr, "adapter.embedding_lr")

    def training_form(self, layers: Sequence[ScaledLayer], rule: UpdateRule) -> TrainingForm:
        """B learning k times faster is LoRA with k times the alpha, where Adam undoes the factor.

        B starts at zero, so k·B under a factor s learns as B does under k·s; and A's gradient is
        the same in both (Schulman et al., "LoRA Without Regret", 2025).  An embedding's A and B
        share a rate of their own, and so keep the two apart.
        """
        form = super().training_form(layers, rule)
        is_lora = self.lr_ratio == 1 or (rule.undoes_scale and self.B_starts_at_zero)
        if not is_lora or not rule.adapter_only or any(one.is_embedding for one in layers):
            return form
        lora = form.with_settings("lr_ratio", "embedding_lr", variant=LoRAConfig.variant)
        return lora.scaled(self.lr_ratio)

    def search_axes(self) -> dict[str, tuple[float, ...]]:
        """The paper recommends 16, and less for easy tasks."""
        return {"lr_ratio": (4.0, 16.0)}

    def advice_on_jumps(self) -> str:
        if self.lr_ratio <= 1:
            return ""
        return (
            f"B learns {self.lr_ratio:g} times as fast as A: lower adapter.lr_ratio (8 or 4), or "
            "the learning rate (trainer.lr_scale)."
        )

    def warnings(self) -> list[str]:
        if self.lr_ratio > 32:
            return [f"adapter.lr_ratio={self.lr_ratio:g} is above 32: training may be unstable"]
        return []
