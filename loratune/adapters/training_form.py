"""When two settings are one training under two names: up to rounding, every loss is the same.

Adam divides each gradient by its own size.  Where nothing else looks at that size, a factor on the
gradient is undone, and what a factor on the correction changes, a learning rate can change as well.
Its epsilon, weight decay and a bound on the gradients' common norm do look at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

SMALL_EPS = 1e-12
"""An epsilon above it shows in the losses, though it is far below a usual gradient's size: some
gradients are far below the usual."""
_DIGITS = 6
"""Scales and rates that agree to so many digits are one, and its rounding in a recipe."""


@dataclass(frozen=True, slots=True)
class ScaledLayer:
    """One adapted layer: its rank, and the factor on its correction."""

    name: str
    rank: int
    scaling: float
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """What looks at the size of a gradient.

    Attributes:
        eps: Adam's epsilon; ``None`` is the optimizer's own.
        weight_decay: decoupled decay.
        clip_norm: bound on the norm of all gradients together; 0 is none.
        adapter_only: whether nothing but the adapters of layers trains.
    """

    eps: float | None
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    adapter_only: bool = True

    @property
    def undoes_scale(self) -> bool:
        """Whether a factor on a gradient changes nothing."""
        return not self.obstacles()

    def obstacles(self) -> list[str]:
        """Settings by which a factor on a gradient does change something."""
        eps = "its default" if self.eps is None else f"{self.eps:g}"
        looks = {
            f"trainer.clip_norm={self.clip_norm:g}": self.clip_norm > 0,
            f"trainer.weight_decay={self.weight_decay:g}": self.weight_decay > 0,
            f"trainer.eps at {eps}": self.eps is None or not 0 < self.eps <= SMALL_EPS,
        }
        return [setting for setting, does in looks.items() if does]

    def without_obstacles(self) -> Self:
        """The same rule where a factor on a gradient changes nothing."""
        return replace(self, eps=SMALL_EPS, weight_decay=0.0, clip_norm=0.0)


@dataclass(frozen=True)
class TrainingForm:
    """What decides an adapter's training: two of one form and one rate are one training.

    Attributes:
        settings: of the variant, without rate and strength.
        layers: what is adapted, and how strongly.
        lr: the learning rate that goes with these scales.
    """

    settings: Mapping[str, Any]
    layers: tuple[ScaledLayer, ...]
    lr: float

    def with_settings(self, *dropped: str, **changed: Any) -> TrainingForm:
        """The same without some settings, and with others changed."""
        kept = {key: value for key, value in self.settings.items() if key not in dropped}
        return replace(self, settings=kept | changed)

    def scaled(self, factor: float) -> TrainingForm:
        """The same with every layer's correction multiplied."""
        layers = (replace(one, scaling=one.scaling * factor) for one in self.layers)
        return replace(self, layers=tuple(layers))

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for forms that are one training wherever their rates are equal."""
        layers = tuple((one.name, one.rank, rounded(one.scaling)) for one in self.layers)
        return (*sorted((name, str(value)) for name, value in self.settings.items()), *layers)


def rounded(value: float) -> float:
    """A scale or a rate to the digits that tell two apart."""
    return float(f"{value:.{_DIGITS}g}")
