"""IA3's settings and counts (arXiv:2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from loratune.adapters.config import AdapterConfig, AdapterCount, LayerKind, LayerShape
from loratune.errors import ConfigError

_PREFIX, _SUFFIX = r"(?:.*\.)?(?:", ")"


@dataclass(kw_only=True)
class IA3Config(AdapterConfig):
    """Every output of a layer, its bias included, times a trained factor; or every input."""

    peft_type: ClassVar[str] = "IA3"

    without_effect: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "dropout", "rank_pattern", "alpha_pattern",
    )  # fmt: skip

    variant: str = "ia3"
    rank: int = 1
    lr: float = 5e-3
    feedforward_layers: list[str] = field(
        default_factory=lambda: ["down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"]
    )
    """Ends of the names of layers whose inputs are scaled: the last of a feedforward block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.feedforward_layers:
            if not re.fullmatch(r"[\w.]+", name):
                raise ConfigError(
                    f"'{name}' is not the end of a layer's name",
                    where="adapter.feedforward_layers",
                    fix="name layers as the model does, for example mlp.c_proj",
                )

    def scaling(self, rank: int, alpha: float | None) -> float:
        """1: the factors train from 1, by themselves."""
        return 1.0

    def scales_inputs(self, shape: LayerShape) -> bool:
        """Whether a layer's inputs are scaled instead of its outputs."""
        return any(f".{shape.name}".endswith(f".{name}") for name in self.feedforward_layers)

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        if shape.kind is LayerKind.embedding:
            return "IA3 cannot adapt an embedding"
        return super().check_layer(shape, rank)

    def to_peft(self) -> dict[str, Any]:
        """PEFT wants listed names to be targets too, and takes any regular expression."""
        names = "|".join(map(re.escape, self.feedforward_layers))
        return {
            "peft_type": self.peft_type,
            "feedforward_modules": f"{_PREFIX}{names}{_SUFFIX}" if names else [],
            "init_ia3_weights": True,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        names = _names(peft.get("feedforward_modules") or [])
        return cls(
            feedforward_layers=names, **cls.training_only(training, "rank", "feedforward_layers")
        )

    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """In numbers for a layer whose inputs are scaled, else out; all trained."""
        scaled = shape.in_features if self.scales_inputs(shape) else shape.out_features
        return AdapterCount(trainable=scaled, frozen=0)


def _names(given: str | list[str]) -> list[str]:
    """The names that ``feedforward_modules`` lists, or says in our own expression.

    Raises:
        ValueError: for another expression.
    """
    if not isinstance(given, str):
        return [str(name) for name in given]
    names = given.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    if given != f"{_PREFIX}{names}{_SUFFIX}" or not re.fullmatch(r"(\w|\\\.|\|)+", names):
        raise ValueError("feedforward_modules is a regular expression: list the names instead")
    return names.replace(r"\.", ".").split("|")
