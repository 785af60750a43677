"""Settings and counts of a gain for every output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, Kernel, LayerKind, LayerShape


@dataclass(kw_only=True)
class GainConfig(AdapterConfig):
    """ΔW = diag(strength · g / ‖rows of W‖) W with g (out,) trained."""

    peft_type: ClassVar[str] = "GAIN"
    without_effect: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "dropout", "kernel", "rank_pattern", "alpha_pattern",
    )  # fmt: skip

    variant: str = "gain"
    lr: float = 1e-2
    strength: float = 2.0
    """Factor on every gain."""

    def scaling(self, rank: int, alpha: float | None) -> float:
        return self.strength

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        return "no gain for an embedding" if shape.kind is LayerKind.embedding else ""

    def search_axes(self) -> dict[str, tuple[float, ...]]:
        return {"strength": (1.0, 3.0)}

    def to_peft(self) -> dict[str, Any]:
        return {"peft_type": self.peft_type, "r": self.rank, "strength": self.strength}

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        extra = cls.training_only(training, "rank", "strength")
        kernel = Kernel(extra.pop("kernel", Kernel.auto))
        strength = float(peft["strength"])
        return cls(rank=int(peft["r"]), strength=strength, kernel=kernel, **extra)

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        return AdapterCount(trainable=shape.out_features, frozen=0)
