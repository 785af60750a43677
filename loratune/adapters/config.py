"""What every adapter variant's configuration shares, and the closed-form counts.

Nothing here imports torch: counting a known model's parameters must answer at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, ClassVar, Self, TypeVar

from loratune.adapters.training_form import ScaledLayer, TrainingForm, UpdateRule
from loratune.errors import ConfigError

_Choice = TypeVar("_Choice", bound=StrEnum)


class Kernel(StrEnum):
    """Which implementation of the adapter mathematics runs."""

    auto = "auto"
    reference = "reference"
    fused = "fused"


class LayerKind(StrEnum):
    """How a layer stores its weight: ``(out, in)``, ``(in, out)``, or one row per token.

    Those of all experts may be stacked in one tensor, each of them ``(out, in)`` or ``(in, out)``.
    """

    linear = "linear"
    conv1d = "conv1d"
    embedding = "embedding"
    experts = "experts"
    experts_conv1d = "experts_conv1d"


class LayerPlace(StrEnum):
    """Which part of the model holds a layer: the text model, its output head, or a tower.

    A tower is a model inside the model that reads images or sound, and no text.
    """

    text = "text"
    head = "head"
    tower = "tower"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer that can be adapted.

    ``in_features`` is the vocabulary size for an embedding, ``out_features`` its width.
    """

    name: str
    kind: LayerKind
    in_features: int
    out_features: int
    parameters: int = 0
    """Numbers the base layer itself holds (weight and bias); 0 where nobody asked."""
    place: LayerPlace = LayerPlace.text
    experts: int = 1
    """How many layers are stacked in the tensor; each has ``in_features`` and ``out_features``."""
    tied_to: str = ""
    """An earlier layer whose weight this one shares (a tied head's embedding), if there is one."""

    @property
    def is_stacked(self) -> bool:
        """Whether it is a parameter that stacks the layers of all experts, and not a module."""
        return self.kind in (LayerKind.experts, LayerKind.experts_conv1d)

    @property
    def parameter(self) -> str:
        """Full name of its weight in the model."""
        return self.name if self.is_stacked else f"{self.name}.weight"


@dataclass(frozen=True, slots=True)
class AdapterCount:
    """Numbers an adapter adds to a model, by what happens to them."""

    trainable: int
    frozen: int

    @property
    def stored(self) -> int:
        """Numbers in the adapter file: a frozen random matrix is needed to reload it."""
        return self.trainable + self.frozen

    def __add__(self, other: AdapterCount) -> AdapterCount:
        return AdapterCount(self.trainable + other.trainable, self.frozen + other.frozen)


@dataclass(kw_only=True)
class AdapterConfig(ABC):
    """Settings that every variant understands, and what the rest of the program asks of one."""

    peft_type: ClassVar[str]
    """``peft_type`` in ``adapter_config.json``.

    A file without our own record beside it is read as the variant whose class sets this itself; a
    variant that inherits it trains the same structure in another way.
    """
    peft_switches: ClassVar[frozenset[str]] = frozenset()
    """Settings that, switched on in a file of ``peft_type``, make it this variant's."""

    without_effect: ClassVar[tuple[str, ...]] = ()
    """Settings of every variant that this one has no use for: nobody may change them."""

    variant: str = ""
    """Set by the variant's own class; names its folder under ``loratune/adapters``."""
    rank: int = 8
    """Width r of the bottleneck: parameters grow in proportion."""
    alpha: float | None = None
    """Strength of the adapter; null means equal to the rank, that is scaling 1."""
    dropout: float = 0.0
    """Share of the adapter's input dropped in training, in [0, 1)."""
    lr: float = 2e-4
    """Learning rate this variant works well with; ``trainer.lr`` takes it by default."""
    kernel: Kernel = Kernel.auto
    """reference is bit-equal to PEFT, fused is faster and leaner, auto takes fused if it can."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name (suffix or regular expression) to the rank used there instead."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Module name (suffix or regular expression) to the alpha used there instead."""

    def __post_init__(self) -> None:
        self.kernel = choice(Kernel, self.kernel, "adapter.kernel")
        for name, value in [("rank", self.rank), *_items("rank_pattern", self.rank_pattern)]:
            if value < 1:
                raise ConfigError(f"{value} is too small", where=f"adapter.{name}", fix="use >= 1")
        for name, number in [("alpha", self.alpha), *_items("alpha_pattern", self.alpha_pattern)]:
            if number is not None and not (math.isfinite(number) and number > 0):
                raise ConfigError(
                    f"{number} is not a positive number",
                    where=f"adapter.{name}",
                    fix="use a number above 0, or null for the rank",
                )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"{self.dropout} is out of range", where="adapter.dropout", fix="use [0, 1)"
            )
        check_learning_rate(self.lr, "adapter.lr")

    def useless_settings(self) -> list[ConfigError]:
        """An error for each setting that has no effect here and is not at its default."""
        default = type(self)()
        return [
            ConfigError(
                f"'adapter.{name}' has no effect with {self.variant}",
                where=f"adapter.{name}",
                fix=f"leave it at {getattr(default, name)}",
            )
            for name in self.without_effect
            if getattr(self, name) != getattr(default, name)
        ]

    def with_rank(self, rank: int) -> Self:
        """The same settings at another rank, where the variant has one."""
        return self if "rank" in self.without_effect else replace(self, rank=rank)

    def warnings(self) -> list[str]:
        """What is allowed but likely to go wrong, one sentence each."""
        return []

    @abstractmethod
    def scaling(self, rank: int, alpha: float | None) -> float:
        """Factor on the correction of a layer with this rank and alpha."""

    def check_layer(self, shape: LayerShape, rank: int) -> str:
        """Why this variant cannot adapt ``shape`` at this rank, or an empty string."""
        if shape.is_stacked:
            return f"{self.variant} cannot adapt experts that are stacked in one tensor"
        return ""

    def why_not_in_peft(self, shape: LayerShape) -> str:
        """Why PEFT cannot adapt a layer that this variant can, or an empty string."""
        return ""

    def why_not_quantized(self) -> str:
        """Why this variant cannot adapt layers whose weights are quantized, or an empty string."""
        return ""

    def starts_from_quantization_error(self) -> bool:
        """Whether the start reads the weights that quantized layers were made of."""
        return False

    def without_costly_init(self) -> Self:
        """The same settings with the cheapest start, for an adapter about to be loaded."""
        return self

    def why_not_redrawn(self) -> str:
        """Why frozen tensors cannot be drawn again from their seed, or an empty string."""
        return ""

    def trains_whole_model(self) -> bool:
        """Whether every parameter of the model trains, whatever the targets name."""
        return False

    def leaves_shared_to_seed(self) -> bool:
        """Whether the adapter file leaves the shared tensors out, to be drawn again."""
        return False

    def with_shared_stored(self, stored: bool) -> Self:
        """The same settings with the shared tensors in the adapter file, or left to their seed."""
        return self

    def search_axes(self) -> dict[str, tuple[float, ...]]:
        """Settings to search beside the learning rate (one at most), with values to try."""
        return {}

    def training_form(self, layers: Sequence[ScaledLayer], rule: UpdateRule) -> TrainingForm:
        """What decides the training of these settings, up to rounding.

        A variant that knows of settings that come to the same gives them the same form.

        Args:
            layers: those that are adapted.
            rule: what the optimizer makes of a gradient's size.
        """
        elsewhere = {"lr", "rank", "alpha", "rank_pattern", "alpha_pattern"}
        names = [item.name for item in fields(self) if item.name not in elsewhere]
        return TrainingForm({name: getattr(self, name) for name in names}, tuple(layers), self.lr)

    def advice_on_jumps(self) -> str:
        """What to lower, beside the learning rate, where the loss jumps; or an empty string."""
        return ""

    @abstractmethod
    def to_peft(self) -> dict[str, Any]:
        """The variant's part of PEFT's ``adapter_config.json``."""

    @classmethod
    @abstractmethod
    def from_peft(cls, peft: Mapping[str, Any], training: Mapping[str, Any]) -> Self:
        """The settings behind an ``adapter_config.json``.

        Args:
            peft: the file's content.
            training: our own record of the settings, empty for an adapter that PEFT wrote; it
                completes what PEFT has no place for and never contradicts the file.
        """

    @classmethod
    def training_only(cls, training: Mapping[str, Any], *known: str) -> dict[str, Any]:
        """Of a record of settings, those this class has and PEFT's file does not decide."""
        own = {field.name for field in fields(cls)} - set(known) - {"variant"}
        return {key: value for key, value in training.items() if key in own}

    def count(self, layers: Sequence[tuple[LayerShape, int]]) -> AdapterCount:
        """Numbers added to ``layers``, each given with its rank, in closed form."""
        shared = AdapterCount(trainable=0, frozen=self.shared_count(layers))
        return sum((self.count_layer(shape, rank) for shape, rank in layers), start=shared)

    def shared_count(self, layers: Sequence[tuple[LayerShape, int]]) -> int:
        """Frozen numbers that ``layers`` share, counted once."""
        return 0

    def stored(self, count: AdapterCount) -> int:
        """Numbers in the adapter file, of those that ``count`` names."""
        return count.trainable if self.leaves_shared_to_seed() else count.stored

    @abstractmethod
    def count_layer(self, shape: LayerShape, rank: int) -> AdapterCount:
        """Numbers that belong to one layer alone (what layers share is not among them)."""


def check_learning_rate(value: float, where: str) -> None:
    """Check that a setting is a finite number of at least 0.

    Raises:
        ConfigError: if it is not.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{value} is not a learning rate", where=where, fix="use a number >= 0")


def choice(kind: type[_Choice], value: str, where: str) -> _Choice:
    """A setting that Python code may give as a plain string.

    Raises:
        ConfigError: if there is no such choice.
    """
    try:
        return kind(value)
    except ValueError as error:
        names = ", ".join(kind)
        raise ConfigError(f"no {value!r}", where=where, fix=f"choose one of {names}") from error


def _items(name: str, pattern: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(f"{name}.{key}", value) for key, value in pattern.items()]
