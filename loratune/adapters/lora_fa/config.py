"""LoRA-FA's settings and counts (arXiv:2308.03303)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loratune.adapters.config import AdapterCount, LayerKind, LayerShape
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.training_form import ScaledLayer, TrainingForm, UpdateRule


@dataclass(kw_only=True)
class LoRAFAConfig(LoRAConfig):
    """LoRA with A frozen at its initial value: only B trains."""

    variant: str = "lora_fa"
    lr: float = 8e-4
    projected: bool = False
    """Replace B's gradient by its closed form (1/s²)·g·(AAᵀ)⁻¹ (version 2 of the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_start_is_zero()

    def training_form(self, layers: Sequence[ScaledLayer], rule: UpdateRule) -> TrainingForm:
        """Alpha and the learning rate are one setting where Adam undoes a gradient's factor.

        Only B trains, from zero: s·B moves by s times the rate.  The closed form's 1/s² is a
        factor on the gradient too.
        """
        form = super().training_form(layers, rule)
        if not (layers and rule.undoes_scale and rule.adapter_only and self.B_starts_at_zero):
            return form
        scaling = layers[0].scaling
        return replace(form.scaled(1 / scaling), lr=form.lr * scaling)

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        if shape.kind is LayerKind.embedding:
            return "LoRA-FA cannot adapt an embedding: its frozen factor would start at zero"
        if shape.is_stacked and self.projected:
            return "projected=true does not apply to experts stacked in one tensor"
        return super().check_layer(shape, rank)

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """r·out trained, r·in frozen and stored; of stacked experts for each."""
        ranks = shape.experts * rank
        return AdapterCount(trainable=ranks * shape.out_features, frozen=ranks * shape.in_features)
