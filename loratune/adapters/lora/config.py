"""LoRA's settings and counts (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerShape, choice


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


@dataclass(kw_only=True)
class LoRAConfig(AdapterConfig):
    """ΔW = scaling · B A with A (rank, in) and B (out, rank), both trained."""

    peft_type: ClassVar[str] = "LORA"

    variant: str = "lora"
    init: Init = Init.kaiming
    """How A starts: kaiming, gaussian, orthonormal, svd (random is for tests)."""
    rslora: bool = False
    """Divide alpha by √rank, not by rank, so that a high rank keeps its strength."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init = choice(Init, self.init, "adapter.init")

    def scaling(self, rank: int, alpha: float | None) -> float:
        """alpha/rank, or alpha/√rank with rsLoRA (arXiv:2312.03732); alpha null means rank."""
        resolved = float(rank) if alpha is None else alpha
        return resolved / math.sqrt(rank) if self.rslora else resolved / rank

    def check_layer(self, shape: LayerShape) -> str:
        if shape.is_stacked and self.dropout:
            return "experts stacked in one tensor take no dropout: adapter.dropout=0"
        if shape.is_stacked and self.init in (Init.orthonormal, Init.svd):
            return f"init={self.init} does not apply to experts stacked in one tensor"
        return ""

    def without_costly_init(self) -> Self:
        return replace(self, init=Init.kaiming)

    def why_not_redrawn(self) -> str:
        if self.init is Init.svd:
            return "init=svd starts from the base's own numbers"
        return ""

    def to_peft(self) -> dict[str, Any]:
        alpha_pattern = dict(self.alpha_pattern)
        if self.alpha is None:  # alpha follows each layer's own rank; PEFT's does not
            own = {key: float(rank) for key, rank in self.rank_pattern.items()}
            alpha_pattern = {
                **alpha_pattern,
                **{k: v for k, v in own.items() if k not in alpha_pattern},
            }
        return {
            "peft_type": self.peft_type,
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else _plain(self.alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "init_lora_weights": "gaussian" if self.init is Init.gaussian else True,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": alpha_pattern,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        known = ("rank", "alpha", "dropout", "rslora", "rank_pattern", "alpha_pattern")
        gaussian = peft.get("init_lora_weights") == "gaussian"
        extra: dict[str, Any] = {"init": Init.gaussian if gaussian else Init.kaiming}
        extra |= cls.training_only(training, *known)
        return cls(
            rank=int(peft["r"]),
            alpha=float(peft["lora_alpha"]),
            dropout=float(peft.get("lora_dropout", 0.0)),
            rslora=bool(peft.get("use_rslora", False)),
            rank_pattern={str(k): int(v) for k, v in (peft.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (peft.get("alpha_pattern") or {}).items()},
            **extra,
        )

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """r·(in + out), all trained; of stacked experts for each."""
        width = shape.in_features + shape.out_features
        return AdapterCount(trainable=shape.experts * rank * width, frozen=0)


def _plain(alpha: float) -> float:
    """8 rather than 8.0: some servers accept integers only."""
    return int(alpha) if float(alpha).is_integer() else alpha
