"""Adapters without their frozen random matrices: a seed and a checksum instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loratune.adapter_files.offline import MetaAdapter
from loratune.adapter_files.peft_config import PREFIX
from loratune.errors import ModelError
from loratune.models.build import meta_base
from loratune.models.fingerprint import tensors_fingerprint
from loratune.surgery import WrappedModel, adapter_state, wrap_model


def drop_frozen(offline: MetaAdapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained tensors, and how to draw the frozen ones again.

    Raises:
        ModelError: if nothing is frozen, or the recorded seed does not give the same matrices.
    """
    tensors = {key: value.cpu() for key, value in adapter_state(offline.wrapped).items()}
    frozen = frozen_keys(offline.wrapped)
    if not frozen:
        raise ModelError(
            "every tensor of this adapter was trained: there is nothing to leave out",
            where=str(offline.folder.path),
            fix="export format=peft",
        )
    recipe = {
        "seed": offline.folder.facts.get("seed"),
        "checksum": tensors_fingerprint({key: tensors[key] for key in frozen}),
        "tensors": sorted(frozen),
    }
    drawn = regenerated(offline, recipe)
    if any(not torch.equal(drawn[key], tensors[key]) for key in frozen):
        raise ModelError(
            "the frozen matrices do not come from the recorded seed",
            where=str(offline.folder.path),
            fix="export format=peft keeps them",
        )
    return {key: value for key, value in tensors.items() if key not in frozen}, recipe


def frozen_keys(wrapped: WrappedModel) -> set[str]:
    """File keys of the adapter's own tensors that never train."""
    return {
        f"{PREFIX}{name}.{suffix}"
        for name, layer in wrapped.adapters.items()
        for suffix, tensor in layer.adapter_tensors().items()
        if not tensor.requires_grad
    }


def regenerated(offline: MetaAdapter, recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a fresh adapter with the recorded seed on the same base.

    Raises:
        ModelError: if no seed was recorded.
    """
    if not isinstance(recipe.get("seed"), int):
        raise ModelError(
            "the adapter does not say which seed its frozen matrices came from",
            where=str(offline.folder.path),
            fix="export format=peft keeps them",
        )
    folder = offline.folder
    reason = folder.config.why_not_redrawn()
    if reason:
        raise ModelError(
            f"{reason}: the frozen matrices cannot be drawn again from a seed",
            where=str(folder.path),
            fix="export format=peft keeps them",
        )
    model = meta_base(offline.base_folder)
    wrapped = wrap_model(
        model, folder.config, folder.targets, seed=int(recipe["seed"]), strict=False
    )
    return adapter_state(wrapped)
