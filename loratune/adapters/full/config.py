"""Full fine-tuning's settings and counts: the yardstick that the other variants are measured by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerShape


@dataclass(kw_only=True)
class FullConfig(AdapterConfig):
    """W' in place of W, trained as it is: of the layers that are named, or of the whole model."""

    peft_type: ClassVar[str] = "FULL"
    without_effect: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "kernel", "rank_pattern", "alpha_pattern",
    )  # fmt: skip

    variant: str = "full"
    lr: float = 2e-5
    every_parameter: bool = False
    """Train biases, norms and embeddings too, and every layer; ``targets`` is then not used."""

    def scaling(self, rank: int, alpha: float | None) -> float:
        """1: the weights themselves train."""
        return 1.0

    def trains_whole_model(self) -> bool:
        return self.every_parameter

    def why_not_quantized(self) -> str:
        return (
            "it trains the weights themselves, and steps between 4- or 8-bit numbers are too wide"
        )

    def why_not_in_peft(self, shape: LayerShape) -> str:
        return "it has none that trains whole weights (export format=merged gives a plain model)"

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": self.peft_type,
            "r": self.rank,
            "every_parameter": self.every_parameter,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        return cls(
            rank=int(peft["r"]),
            every_parameter=bool(peft.get("every_parameter", False)),
            **cls.training_only(training, "rank", "every_parameter"),
        )

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """In · out, whatever the rank; a tied weight counts once; biases where all train."""
        weight = shape.in_features * shape.out_features
        bias = max(shape.parameters - weight, 0) if self.every_parameter else 0
        return AdapterCount(trainable=bias + (0 if shape.tied_to else weight), frozen=0)
