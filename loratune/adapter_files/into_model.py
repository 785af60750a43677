"""A saved adapter put into a model: wrapped by its configuration, its tensors copied in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter_files.checks import misfits
from loratune.adapter_files.embeddings import ReadTensor, with_embeddings
from loratune.adapter_files.peft_config import CONFIG, PREFIX, unusable_setting
from loratune.adapter_files.peft_format import (
    TENSORS,
    AdapterFolder,
    shared_fingerprint,
    shared_keys,
)
from loratune.errors import ConfigError, ModelError, raise_together
from loratune.models.fingerprint import tensors_fingerprint
from loratune.models.unread import UnreadParameters
from loratune.surgery import WrappedModel, adapter_state, peft_names, wrap_model


def wrap_for_loading(
    model: nn.Module,
    folder: AdapterFolder,
    read: ReadTensor | None = None,
    unread: UnreadParameters | None = None,
) -> WrappedModel:
    """Wrap a model as an adapter's configuration says and copy its tensors in.

    Frozen matrices that a compact file left out are drawn again from its seed; a model whose
    vocabulary is not that of the adapter's embeddings is resized to them.

    Args:
        model: the base model.
        folder: the adapter.
        read: gives a tensor of the base, where the model itself holds no data.
        unread: is to read them later, and with them what the adapter trains in their place.

    Raises:
        ModelError: if it does not fit, or the drawn matrices are not the recorded ones.
    """
    folder = with_embeddings(model, folder, read or (lambda name: model.state_dict()[name]))
    recipe = folder.facts.get("regenerate") or {}
    try:
        wrapped = wrap_model(
            model,
            folder.config,
            folder.targets,
            seed=int(recipe.get("seed", 0)),
            strict=False,
            will_be_loaded=not recipe,
            copy=unread.trained_copy if unread else None,
        )
    except ConfigError as error:
        raise unusable_setting(error, str(folder.path / CONFIG)) from error
    except ModelError as error:
        error.where = error.where or str(folder.path)
        raise
    load_into(wrapped, folder)
    if unread is not None:
        _read_later(wrapped, folder.tensors, unread)
    return wrapped


def load_into(wrapped: WrappedModel, folder: AdapterFolder) -> None:
    """Copy an adapter's tensors into a model wrapped by its configuration.

    Raises:
        ModelError: listing every missing, unexpected and misshapen tensor.
    """
    expected = adapter_state(wrapped)
    recipe = folder.facts.get("regenerate") or {}
    optional = set(recipe.get("tensors", ()))
    if folder.config.leaves_shared_to_seed():
        optional |= shared_keys(wrapped)
    where = str(folder.path / TENSORS)
    copies = _base_copies(wrapped, folder, where)
    given = {key: value for key, value in folder.tensors.items() if key not in copies}
    raise_together(misfits(expected, given, optional, where))
    _copy_in(wrapped, given)
    _check_shared(wrapped, folder)
    if recipe:
        _check_regenerated(wrapped, recipe, where)


def _base_copies(wrapped: WrappedModel, folder: AdapterFolder, where: str) -> set[str]:
    """Keys of the copies of an adapted embedding's base weight that PEFT stores.

    Raises:
        ModelError: if a copy is not the base's own weight (a resized or retrained vocabulary).
    """
    copies = {}
    for name, adapter in wrapped.adapters.items():
        key = f"{PREFIX}{name}.base_layer.weight"
        if key in folder.tensors:
            copies[key] = adapter.weight
    for key, weight in copies.items():
        given = folder.tensors[key].to(weight.dtype)
        has_data = not weight.is_meta
        if given.shape != weight.shape or (
            has_data and not torch.equal(given.to(weight.device), weight)
        ):
            raise ModelError(
                f"the adapter brings another base weight: '{key}'",
                where=where,
                fix="name the base it was trained on, resized as it was",
            )
    return set(copies)


@torch.no_grad()
def _copy_in(wrapped: WrappedModel, tensors: Mapping[str, Tensor]) -> None:
    names = peft_names(wrapped)
    for name, adapter in wrapped.adapters.items():
        start = f"{PREFIX}{names[name]}."
        own = adapter.peft_tensors()
        adapter.load_peft_tensors({s: tensors.get(start + s, value) for s, value in own.items()})
        for key, tensor in adapter.shared_tensors().items():
            if key in tensors:
                tensor.copy_(tensors[key])
    for name, saved in wrapped.saved_modules.items():
        for suffix, tensor in saved.trained_module.state_dict().items():
            tensor.copy_(tensors[f"{PREFIX}{name}.{suffix}"])


def _read_later(
    wrapped: WrappedModel, tensors: Mapping[str, Tensor], unread: UnreadParameters
) -> None:
    """What has no data yet took nothing from the file: it is read with the base, as wanted."""
    names = peft_names(wrapped)
    places = [
        (f"{PREFIX}{names[name]}.{suffix}", value)
        for name, adapter in wrapped.adapters.items()
        for suffix, value in adapter.peft_tensors().items()
    ] + [
        (f"{PREFIX}{name}.{suffix}", value)
        for name, saved in wrapped.saved_modules.items()
        for suffix, value in saved.trained_module.named_parameters()
    ]
    for key, value in places:
        if value.is_meta and key in tensors:
            unread.begin_with(value, tensors[key])


def _check_shared(wrapped: WrappedModel, folder: AdapterFolder) -> None:
    recorded = folder.facts.get("projection")
    if recorded and recorded != shared_fingerprint(wrapped):
        raise ModelError(
            f"the shared matrices differ: {recorded[:12]} → "
            f"{str(shared_fingerprint(wrapped))[:12]}",
            where=str(folder.path / CONFIG),
            fix="their seed, the rank and the targets must be those of training",
        )


def _check_regenerated(wrapped: WrappedModel, recipe: Mapping[str, Any], where: str) -> None:
    state = adapter_state(wrapped)
    drawn = tensors_fingerprint({key: state[key] for key in recipe["tensors"]})
    if drawn != recipe["checksum"]:
        raise ModelError(
            "the frozen matrices drawn from the seed are not the recorded ones", where=where
        )
