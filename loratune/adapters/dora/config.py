"""DoRA's settings and counts (arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerShape
from loratune.adapters.lora.config import LoRAConfig


@dataclass(kw_only=True)
class DoRAConfig(LoRAConfig):
    """W' = m ⊙ V/‖V‖ with V = W + scaling · B A, norms and m by output; m, A and B trained."""

    peft_type: ClassVar[str] = "LORA"
    peft_switches: ClassVar[frozenset[str]] = frozenset({"use_dora"})

    variant: str = "dora"
    lr: float = 1e-4
    exact_gradient: bool = False
    """Let the gradient of A and B flow through ‖V‖ too, which the paper treats as a constant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_start_is_zero()

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        return AdapterConfig.check_layer(self, shape, rank)

    def to_peft(self) -> dict[str, Any]:
        return {**super().to_peft(), "use_dora": True}

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """r·(in + out) + out, all trained."""
        factors = super().count_layer(shape, rank)
        return AdapterCount(factors.trainable + shape.out_features, factors.frozen)
