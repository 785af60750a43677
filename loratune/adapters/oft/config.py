"""OFT's settings and counts (arXiv:2306.07280, and OFTv2's form of it, arXiv:2506.19847)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerKind, LayerShape
from loratune.errors import ConfigError

_REFUSED = ("coft", "block_share", "r")
"""Settings of PEFT's that change what is computed, or counted, and are not here."""


@dataclass(kw_only=True)
class OFTConfig(AdapterConfig):
    """W' = W Rᵀ with R block-diagonal and orthogonal: the inputs are rotated, lengths stay.

    Each block is Cayley's (I + Q)(I − Q)⁻¹ of a trained skew-symmetric Q; solved exactly it is that
    of −Q, as in PEFT.
    """

    peft_type: ClassVar[str] = "OFT"

    without_effect: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "dropout", "rank_pattern", "alpha_pattern",
    )  # fmt: skip

    variant: str = "oft"
    rank: int = 1
    lr: float = 1e-3
    block_size: int = 32
    """Inputs that are rotated together; where it does not divide them, the nearest that does."""
    cayley_terms: int = 5
    """Terms of the series that stands for the inverse, as in PEFT; 0 solves it exactly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = (("block_size", self.block_size, 2), ("cayley_terms", self.cayley_terms, 0))
        for name, value, lowest in limits:
            if value < lowest:
                raise ConfigError(
                    f"{value} is too small", where=f"adapter.{name}", fix=f"use >= {lowest}"
                )
        if self.cayley_terms in (1, 2, 3):
            raise ConfigError(
                f"{self.cayley_terms} terms are no rotation",
                where="adapter.cayley_terms",
                fix="use 4 or more, or 0 for the exact inverse",
            )

    def scaling(self, rank: int, alpha: float | None) -> float:
        """1: a rotation has no strength."""
        return 1.0

    def block_of(self, width: int) -> int:
        """The divisor of ``width`` that is nearest to the block size, the smaller of two."""
        if self.block_size >= width:
            return width
        divisors = (size for size in range(1, width + 1) if width % size == 0)
        return min(divisors, key=lambda size: (abs(size - self.block_size), size))

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        if shape.kind is LayerKind.embedding:
            return "OFT cannot adapt an embedding here"
        return super().check_layer(shape, rank)

    def why_not_in_peft(self, shape: LayerShape) -> str:
        return "its OFT has no Conv1D" if shape.kind is LayerKind.conv1d else ""

    def to_peft(self) -> dict[str, Any]:
        """The version is the first that has this series; without it PEFT warns of an older one."""
        return {
            "peft_version": "0.18.0",
            "peft_type": self.peft_type,
            "bias": "none",
            "r": 0,
            "oft_block_size": self.block_size,
            "module_dropout": 0.0,
            "coft": False,
            "eps": 6e-5,
            "block_share": False,
            "use_cayley_neumann": self.cayley_terms > 0,
            "num_cayley_neumann_terms": self.cayley_terms or 5,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        for key in _REFUSED:
            if peft.get(key):
                raise ValueError(f"{key}={peft[key]} is not supported")
        is_series = bool(peft.get("use_cayley_neumann", True))
        if is_series and not peft.get("peft_version"):
            raise ValueError("peft_version is missing: PEFT before 0.18 had another series")
        return cls(
            block_size=int(peft["oft_block_size"]),
            cayley_terms=int(peft.get("num_cayley_neumann_terms", 5)) if is_series else 0,
            **cls.training_only(training, "rank", "block_size", "cayley_terms"),
        )

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """A block of b inputs has b·(b − 1)/2 angles: in·(b − 1)/2 in all, trained."""
        block = self.block_of(shape.in_features)
        return AdapterCount(trainable=shape.in_features * (block - 1) // 2, frozen=0)
