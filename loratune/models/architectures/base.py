"""A model as a list of layers with names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratune.adapters.config import LayerKind, LayerPlace, LayerShape
from loratune.errors import ConfigError

STACKED_EXPERTS = "expert weights stacked in one tensor"
"""Type of an ``OtherModule`` that is one tensor for all experts of a block."""


@dataclass(frozen=True, slots=True)
class OtherModule:
    """A module with parameters that no adapter can wrap: a norm, a position table."""

    name: str
    type_name: str
    parameters: int


Part = LayerShape | OtherModule


@dataclass(frozen=True, slots=True)
class Architecture:
    """Every module of a model that holds parameters.

    Attributes:
        family: ``model_type`` of ``config.json``.
        layers: linear, Conv1D and embedding layers and stacked experts, in ``named_modules()``
            order.
        others: the other modules that hold parameters.
        base_parameters: numbers in the whole model, tied weights counted once.
        numbers: what the architecture was built from.
        unusable: layer to why an adapter can do nothing for it.
    """

    family: str
    layers: tuple[LayerShape, ...]
    others: tuple[OtherModule, ...]
    base_parameters: int
    numbers: Mapping[str, Any]
    unusable: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Layers, then the other modules."""
        return (*self.layers, *self.others)

    @property
    def other_types(self) -> dict[str, str]:
        """Name to type of the modules that no adapter can wrap."""
        return {module.name: module.type_name for module in self.others}

    @property
    def stacked_experts(self) -> dict[str, int]:
        """Name to numbers of the tensors that hold what every expert has, adaptable or not."""
        layers = {shape.name: shape.parameters for shape in self.layers if shape.is_stacked}
        others = {m.name: m.parameters for m in self.others if m.type_name == STACKED_EXPERTS}
        return layers | others

    @property
    def outer_modules(self) -> tuple[str, ...]:
        """Modules that hold what no layer holds (norms, position tables), the outermost only."""
        owners = [
            m.name.rpartition(".")[0] if m.type_name == STACKED_EXPERTS else m.name
            for m in self.others
        ]
        names = dict.fromkeys(owners)
        return tuple(n for n in names if not any(n.startswith(f"{o}.") for o in names))

    def parameters_of(self, wanted: str) -> dict[str, int]:
        """Full name to parameters of each module called ``wanted`` (a whole dotted suffix).

        A module that holds others is counted with all of them.
        """
        counts: dict[str, int] = {}
        for part in self.parts:
            pieces = part.name.split(".")
            for end in range(1, len(pieces) + 1):
                owner = ".".join(pieces[:end])
                if names_module(wanted, owner):
                    counts[owner] = counts.get(owner, 0) + part.parameters
                    break
        return counts


def names_module(suffix: str, name: str) -> bool:
    """Whether ``suffix`` is ``name`` or its end at a dot, as in PEFT."""
    return name == suffix or name.endswith("." + suffix)


class Numbers:
    """The numbers of a ``config.json``, read with their types checked."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1.

        Raises:
            ConfigError: if it is missing without a default, or not such a number.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise self._error(f"'{key}' is missing", "give the numbers of the model's config.json")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(f"'{key}' is {value!r}", "use a whole number of at least 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            ConfigError: if it is anything else.
        """
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._error(f"'{key}' is {value!r}", "use true or false")
        return value

    def require_unset(self, key: str, cause: str) -> None:
        """Check that ``key`` is missing or false.

        Raises:
            ConfigError: if it is set.
        """
        if self._values.get(key):
            raise self._error(cause, f"'{key}' must be false")

    def _error(self, cause: str, fix: str) -> ConfigError:
        return ConfigError(cause, where=self._where, fix=fix)


@dataclass(frozen=True, slots=True)
class Family:
    """How a model type builds its modules, and whether its embeddings are tied by default."""

    parts: Callable[[Numbers], Iterator[Part]]
    tied_by_default: bool


def linear(name: str, in_features: int, out_features: int, bias: bool) -> LayerShape:
    """A linear layer: weight (out, in)."""
    parameters = in_features * out_features + bias * out_features
    return LayerShape(name, LayerKind.linear, in_features, out_features, parameters)


def output_head(in_features: int, out_features: int) -> LayerShape:
    """The linear layer without a bias, ``lm_head``, that gives the logits."""
    shape = linear("lm_head", in_features, out_features, bias=False)
    return replace(shape, place=LayerPlace.head)


def conv1d(name: str, in_features: int, out_features: int) -> LayerShape:
    """GPT-2's transposed linear layer: weight (in, out), always with a bias."""
    parameters = (in_features + 1) * out_features
    return LayerShape(name, LayerKind.conv1d, in_features, out_features, parameters)


def embedding(name: str, entries: int, width: int) -> LayerShape:
    """A lookup table: weight (entries, width)."""
    return LayerShape(name, LayerKind.embedding, entries, width, entries * width)


def layer_norm(name: str, width: int, affine: bool = True) -> Iterator[OtherModule]:
    """A layer norm: weight and bias, or nothing at all."""
    if affine:
        yield OtherModule(name, "LayerNorm", 2 * width)
