"""VeRA's settings and counts (arXiv:2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerKind, LayerShape
from loratune.errors import ConfigError


@dataclass(kw_only=True)
class VeRAConfig(AdapterConfig):
    """ΔW = Λ_b B Λ_d A: A (rank, in) and B (out, rank) frozen and shared, λ_b and λ_d trained."""

    peft_type: ClassVar[str] = "VERA"

    without_effect: ClassVar[tuple[str, ...]] = ("rank_pattern",)  # the matrices are all layers'

    variant: str = "vera"
    rank: int = 256
    lr: float = 5e-3
    projection_seed: int = 0
    """Seed of the shared random matrices; same seed, targets and rank give the same matrices."""
    d_initial: float = 0.1
    """Starting value of λ_d; λ_b starts at zero, so that training starts at the base model."""
    save_projection: bool = True
    """Store the shared matrices in the adapter file (safe everywhere), or only their seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.d_initial):
            raise ConfigError(f"{self.d_initial} is not a number", where="adapter.d_initial")
        if self.projection_seed < 0:
            raise ConfigError(
                f"{self.projection_seed} is negative",
                where="adapter.projection_seed",
                fix="use >= 0",
            )

    def scaling(self, rank: int, alpha: float | None) -> float:
        """1 unless alpha is set, else alpha/rank (folded into λ_b when saved)."""
        return 1.0 if alpha is None else alpha / rank

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        if shape.kind is LayerKind.embedding:
            return "VeRA cannot adapt an embedding"
        return super().check_layer(shape, rank)

    def to_peft(self) -> dict[str, Any]:
        """PEFT's VeRA has no alpha: our tensors are written with the scaling folded in."""
        return {
            "peft_type": self.peft_type,
            "bias": "none",
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        known = ("rank", "alpha", "dropout", "d_initial", "projection_seed", "save_projection")
        return cls(
            rank=int(peft["r"]),
            dropout=float(peft.get("vera_dropout", 0.0)),
            d_initial=float(peft.get("d_initial", 0.1)),
            projection_seed=int(peft.get("projection_prng_key", 0)),
            save_projection=bool(peft.get("save_projection", True)),
            **cls.training_only(training, *known),
        )

    def leaves_shared_to_seed(self) -> bool:
        return not self.save_projection

    def with_shared_stored(self, stored: bool) -> Self:
        return replace(self, save_projection=stored)

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """Out + r trained; the frozen matrices are shared, so no layer owns them."""
        return AdapterCount(trainable=shape.out_features + rank, frozen=0)

    def shared_count(self, layers: Sequence[tuple[LayerShape, int]]) -> int:
        """r·(max in + max out)."""
        widest_in = max((shape.in_features for shape, _ in layers), default=0)
        widest_out = max((shape.out_features for shape, _ in layers), default=0)
        return self.rank * (widest_in + widest_out)
