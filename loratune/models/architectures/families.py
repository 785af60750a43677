"""The families of models: their layers from the numbers of a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratune.adapters.config import LayerKind, LayerShape
from loratune.errors import ModelError
from loratune.models.architectures.base import (
    Architecture,
    Family,
    Numbers,
    OtherModule,
)
from loratune.models.architectures.gpt2 import GPT2
from loratune.models.architectures.llama import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from loratune.models.architectures.opt import OPT

FAMILIES: dict[str, Family] = {
    "opt": OPT,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
}
"""``model_type`` to how its modules follow from its numbers; checked against transformers."""

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
        # The output head, the last layer, shares the numbers of the input embedding.
        shared = next(shape for shape in layers if shape.kind is LayerKind.embedding)
        total -= shared.parameters
        layers = (*layers[:-1], replace(layers[-1], tied_to=shared.name))
    others = tuple(part for part in parts if isinstance(part, OtherModule))
    return Architecture(model_type, layers, others, total, dict(numbers))


def _check_block_count(numbers: Mapping[str, Any], where: str) -> None:
    for key in ("num_hidden_layers", "n_layer"):
        count = numbers.get(key)
        if isinstance(count, int) and count > _MOST_BLOCKS:
            raise ModelError(
                f"'{key}' is {count}: no such model exists", where=where, fix="check the number"
            )
