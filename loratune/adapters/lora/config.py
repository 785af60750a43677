"""LoRA's settings and counts (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerKind, LayerShape, choice
from loratune.adapters.training_form import ScaledLayer, TrainingForm, UpdateRule
from loratune.errors import ConfigError


class Init(StrEnum):
    """How the factors start; the base weight always stays as it is.

    A is chosen and B starts at zero, except where both do otherwise: those ``is_subtracted`` start
    from the base's own numbers A₀ and B₀ and train s(B A − B₀A₀), which is zero at first too; and
    loftq corrects a quantized base from the first step on.
    """

    kaiming = "kaiming"
    """Uniform on ±1/√in, so that E[AAᵀ] = I/3: the default of PEFT and of ``nn.Linear``."""
    gaussian = "gaussian"
    """Normal with standard deviation 1/rank, as PEFT's ``gaussian``."""
    orthonormal = "orthonormal"
    """Random orthonormal rows: AAᵀ = I."""
    svd = "svd"
    """The top right-singular vectors of the base weight: AAᵀ = I."""
    pissa = "pissa"
    """B₀A₀ is the top of the base weight's singular value decomposition (arXiv:2404.02948)."""
    olora = "olora"
    """B₀A₀ is the beginning of the base weight's QR decomposition (arXiv:2406.01775)."""
    loftq = "loftq"
    """s·B A is the best approximation of what quantizing W lost (arXiv:2310.08659, one step)."""
    subtracted = "subtracted"
    """Any numbers in the place of A₀ and B₀, for an adapter that is about to be loaded."""
    random = "random"
    """A and B both random: the adapter changes the model at once; for tests only."""

    @property
    def reads_weight(self) -> bool:
        """Whether the numbers of the base weight decide the start."""
        return self in (Init.svd, Init.pissa, Init.olora, Init.loftq)

    @property
    def is_subtracted(self) -> bool:
        """Whether what the factors start with is taken away again."""
        return self in (Init.pissa, Init.olora, Init.subtracted)


@dataclass(kw_only=True)
class LoRAConfig(AdapterConfig):
    """ΔW = scaling · B A with A (rank, in) and B (out, rank), both trained."""

    peft_type: ClassVar[str] = "LORA"

    variant: str = "lora"
    init: Init = Init.kaiming
    """How the factors start: kaiming, gaussian, orthonormal, svd; pissa, olora; loftq."""
    rslora: bool = False
    """Divide alpha by √rank, not by rank, so that a high rank keeps its strength."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.init = choice(Init, self.init, "adapter.init")

    def scaling(self, rank: int, alpha: float | None) -> float:
        """alpha/rank, or alpha/√rank with rsLoRA (arXiv:2312.03732); alpha null means rank."""
        resolved = float(rank) if alpha is None else alpha
        return resolved / math.sqrt(rank) if self.rslora else resolved / rank

    def training_form(self, layers: Sequence[ScaledLayer], rule: UpdateRule) -> TrainingForm:
        """With rsLoRA an alpha of a is one of a·√rank without it, whatever the optimizer."""
        return super().training_form(layers, rule).with_settings("rslora")

    @property
    def B_starts_at_zero(self) -> bool:
        """Whether only A decides where the training starts, so that B has no scale of its own."""
        return not (self.init.is_subtracted or self.init is Init.random)

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        if shape.is_stacked and self.dropout:
            return "experts stacked in one tensor take no dropout: adapter.dropout=0"
        is_costly = self.init in (Init.orthonormal, Init.svd) or self.init.is_subtracted
        if shape.is_stacked and is_costly:
            return f"init={self.init} does not apply to experts stacked in one tensor"
        if self.init.is_subtracted and shape.kind is LayerKind.embedding:
            return f"init={self.init} cannot start an embedding"
        return ""

    def starts_from_quantization_error(self) -> bool:
        return self.init is Init.loftq

    def without_costly_init(self) -> Self:
        return replace(self, init=Init.subtracted if self.init.is_subtracted else Init.kaiming)

    def why_not_redrawn(self) -> str:
        if self.init.reads_weight or self.init.is_subtracted:
            return f"init={self.init} starts from the base's own numbers"
        return ""

    def to_peft(self) -> dict[str, Any]:
        """A subtracted start is stored with the trained factors, as plain LoRA of twice the rank.

        So does PEFT convert such adapters: A and A₀ in one matrix, B and −B₀ in the other.
        """
        peft = self._to_peft()
        if not self.init.is_subtracted:
            return peft
        louder = math.sqrt(2) if self.rslora else 2.0  # alpha that gives the same scaling
        return {
            **peft,
            "r": 2 * peft["r"],
            "lora_alpha": _plain(louder * peft["lora_alpha"]),
            "rank_pattern": {key: 2 * rank for key, rank in peft["rank_pattern"].items()},
            "alpha_pattern": {key: louder * a for key, a in peft["alpha_pattern"].items()},
        }

    def _to_peft(self) -> dict[str, Any]:
        alpha_pattern = dict(self.alpha_pattern)
        if self.alpha is None:  # alpha follows each layer's own rank; PEFT's does not
            own = {key: float(rank) for key, rank in self.rank_pattern.items()}
            alpha_pattern = {
                **alpha_pattern,
                **{k: v for k, v in own.items() if k not in alpha_pattern},
            }
        return {
            "peft_type": self.peft_type,
            "bias": "none",
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
        if choice(Init, extra["init"], "adapter.init").is_subtracted:
            return cls._from_twice_the_rank(peft, training)
        return cls(
            rank=int(peft["r"]),
            alpha=float(peft["lora_alpha"]),
            dropout=float(peft.get("lora_dropout", 0.0)),
            rslora=bool(peft.get("use_rslora", False)),
            rank_pattern={str(k): int(v) for k, v in (peft.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (peft.get("alpha_pattern") or {}).items()},
            **extra,
        )

    @classmethod
    def _from_twice_the_rank(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        """The recorded settings, if the file's are what they are stored as.

        Raises:
            ValueError: if they are not.
        """
        config = cls(**{**cls.training_only(training), "dropout": float(peft["lora_dropout"])})
        for key, value in config.to_peft().items():
            if key in peft and key != "fan_in_fan_out" and peft[key] != value:
                raise ValueError(f"{key} is {peft[key]}, and {value} with init={config.init}")
        return config

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """r·(in + out), all trained; a subtracted start is as many numbers again, frozen.

        Of stacked experts for each.
        """
        numbers = shape.experts * rank * (shape.in_features + shape.out_features)
        return AdapterCount(trainable=numbers, frozen=numbers if self.init.is_subtracted else 0)

    def check_start_is_zero(self) -> None:
        """Check that B starts at zero, for a variant that cannot take a start away again.

        Raises:
            ConfigError: if it does not.
        """
        if self.init.is_subtracted:
            raise ConfigError(
                f"{self.variant} cannot start with init={self.init}",
                where="adapter.init",
                fix="use kaiming, gaussian, orthonormal or svd",
            )


def _plain(alpha: float) -> float:
    """8 rather than 8.0: some servers accept integers only."""
    return int(alpha) if float(alpha).is_integer() else alpha
