"""From the numbers of a ``config.json`` to an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.adapters.config import LayerKind, LayerShape
from loratune.errors import ModelError
from loratune.models.architectures.base import Architecture, Numbers, OtherModule
from loratune.models.architectures.roles import FAMILIES

# Far above any real model; a typo beyond it would otherwise list layers for minutes.
_MOST_BLOCKS = 2000


def is_known_family(numbers: Mapping[str, Any]) -> bool:
    """Whether the shapes follow from the numbers alone, without building the model."""
    return numbers.get("model_type") in FAMILIES


def architecture_from_numbers(
    numbers: Mapping[str, Any], where: str = "model.architecture"
) -> Architecture:
    """Every layer of a model, by the numbers of its ``config.json``.

    Args:
        numbers: ``model_type`` and the sizes, as in ``config.json``.
        where: named in errors.

    Raises:
        ModelError: if the family is not known.
        ConfigError: if a number is missing or impossible.
    """
    model_type = numbers.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"the layers of a '{model_type}' model are not known from its numbers",
            where=where,
            fix=f"known families: {', '.join(FAMILIES)}; others are measured from model.path",
        )
    family, checked = FAMILIES[model_type], Numbers(numbers, where)
    _check_block_count(numbers, where)
    parts = list(family.parts(checked))
    layers = tuple(part for part in parts if isinstance(part, LayerShape))
    total = sum(part.parameters for part in parts)
    if checked.flag("tie_word_embeddings", family.tied_by_default):
        total -= _tied_parameters(layers)
    others = tuple(part for part in parts if isinstance(part, OtherModule))
    return Architecture(model_type, layers, others, total, dict(numbers))


def _check_block_count(numbers: Mapping[str, Any], where: str) -> None:
    for key in ("num_hidden_layers", "n_layer"):
        count = numbers.get(key)
        if isinstance(count, int) and count > _MOST_BLOCKS:
            raise ModelError(
                f"'{key}' is {count}: no such model exists", where=where, fix="check the number"
            )


def _tied_parameters(layers: tuple[LayerShape, ...]) -> int:
    """Numbers that the output head shares with the input embedding."""
    first = next(layer for layer in layers if layer.kind is LayerKind.embedding)
    return first.parameters
