"""Whose numbers a recipe's ``model.architecture`` are."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from loratune.config.schema import ModelConfig


def own_numbers(model: ModelConfig, given: Set[str]) -> ModelConfig:
    """``model`` without the numbers of another model.

    A group file names a path and that model's numbers.  Where the command line names another
    path, the numbers left behind are not its own: a folder has its ``config.json``, and a hub id
    is asked for one.

    Args:
        model: as composed.
        given: keys that the command line sets.
    """
    if "model.path" in given and not any(key.startswith("model.architecture") for key in given):
        return replace(model, architecture=None)
    return model
