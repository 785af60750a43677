"""From ``config.json`` to an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.adapters.config import LayerKind, LayerShape
from loratune.errors import ModelError
from loratune.files import read_json
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
            fix=f"known: {', '.join(FAMILIES)}; others are measured from model.path",
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


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a local folder's ``config.json``.

    Raises:
        ModelError: if the folder or the file is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError("no such folder", where=str(folder), fix="set model.path=DIR or a hub id")
    if not path.is_file():
        raise ModelError(
            "there is no config.json in the model's folder",
            where=str(folder),
            fix="point model.path at a folder written by save_pretrained",
        )
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"config.json cannot be read: {error}", where=str(path), fix="copy it anew"
        ) from error
    if not isinstance(content, dict):
        raise ModelError("config.json is not an object", where=str(path), fix="copy it anew")
    return content


def read_architecture(folder: str | Path) -> Architecture:
    """The architecture of a local model folder, by its ``config.json`` alone.

    Raises:
        ModelError: if there is no usable ``config.json``, or the family is not known.
        ConfigError: if a number is missing or impossible.
    """
    numbers = read_config(Path(folder))
    return architecture_from_numbers(numbers, where=str(Path(folder) / "config.json"))
