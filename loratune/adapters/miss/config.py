"""MiSS's settings and counts (arXiv:2409.15371)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerKind, LayerShape


@dataclass(kw_only=True)
class MiSSConfig(AdapterConfig):
    """ΔW = Dᵀ S: a shard D (rank, out) is trained, S (rank, in) repeats it along the inputs.

    S is the identity of the rank's size again and again, cut off at the last input.
    """

    peft_type: ClassVar[str] = "MISS"

    # There is no fused kernel: the plain steps keep no more than r numbers per token.  PEFT's file
    # has one rank for all layers.
    without_effect: ClassVar[tuple[str, ...]] = (
        "alpha", "kernel", "rank_pattern", "alpha_pattern",
    )  # fmt: skip

    variant: str = "miss"
    rank: int = 16
    lr: float = 1e-4

    def scaling(self, rank: int, alpha: float | None) -> float:
        """1: the shard has no strength of its own."""
        return 1.0

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        if shape.kind is LayerKind.embedding:
            return "MiSS cannot adapt an embedding"
        if rank > shape.in_features:
            return f"MiSS of rank {rank} needs as many inputs; there are {shape.in_features}"
        return super().check_layer(shape, rank)

    def why_not_in_peft(self, shape: LayerShape) -> str:
        return "its MiSS has no Conv1D" if shape.kind is LayerKind.conv1d else ""

    def to_peft(self) -> dict[str, Any]:
        return {
            "peft_type": self.peft_type,
            "bias": "none",
            "r": self.rank,
            "miss_dropout": self.dropout,
            "mini_r": 1,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        """A start by name (``bat``, ``mini``) is another formula, and not here.

        Raises:
            ValueError: for such a start.
        """
        start = peft.get("init_weights", True)
        if not isinstance(start, bool):
            raise ValueError(f"init_weights={start} is not supported")
        return cls(
            rank=int(peft["r"]),
            dropout=float(peft.get("miss_dropout", 0.0)),
            **cls.training_only(training, "rank", "dropout"),
        )

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """r·out, all trained; inputs cost nothing."""
        return AdapterCount(trainable=rank * shape.out_features, frozen=0)
