"""LoRA's settings and counts (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerShape
from loratune.adapters.registry import register_config


class Init(StrEnum):
    """How A starts; B starts at zero and the base weight stays as it is in all but ``random``."""

    kaiming = "kaiming"
    """Uniform on ±1/√in, so that E[AAᵀ] = I/3: the default of PEFT and of ``nn.Linear``."""
    gaussian = "gaussian"
    """Normal with standard deviation 1/rank, as PEFT's ``gaussian``."""
    orthonormal = "orthonormal"
    """Random orthonormal rows: AAᵀ = I."""
    svd = "svd"
    """The top right-singular vectors of the base weight: AAᵀ = I."""
    random = "random"
    """A and B both random: the adapter changes the model at once; for tests only."""


@register_config("lora")
@dataclass(kw_only=True)
class LoRAConfig(AdapterConfig):
    """ΔW = scaling · B A with A (rank, in) and B (out, rank), both trained."""

    variant: str = "lora"
    init: Init = Init.kaiming
    """How A starts: kaiming, gaussian, orthonormal, svd (random is for tests)."""
    rslora: bool = False
    """Divide alpha by √rank, not by rank, so that a high rank keeps its strength."""

    def scaling(self, rank: int, alpha: float | None) -> float:
        """alpha/rank, or alpha/√rank with rsLoRA (arXiv:2312.03732); alpha null means rank."""
        resolved = float(rank) if alpha is None else alpha
        return resolved / math.sqrt(rank) if self.rslora else resolved / rank

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """r·(in + out), all trained."""
        return AdapterCount(trainable=rank * (shape.in_features + shape.out_features), frozen=0)

    def count(self, layers: Sequence[tuple[LayerShape, int]]) -> AdapterCount:
        """Σ r·(in + out)."""
        return sum(
            (self.count_layer(shape, rank) for shape, rank in layers), start=AdapterCount(0, 0)
        )
