"""The forms that an adapter can be exported in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loratune.adapter_files.offline import MetaAdapter
from loratune.adapter_files.peft_config import PREFIX
from loratune.adapter_files.peft_format import peft_config, shared_fingerprint, shared_keys
from loratune.adapter_files.plain_lora import plain_facts, plain_lora
from loratune.config.schema import ExportFormat
from loratune.errors import ModelError
from loratune.models.build import meta_base
from loratune.models.fingerprint import tensors_fingerprint
from loratune.surgery import adapter_state, peft_names, wrap_model

Form = tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]
"""adapter_config.json, tensors, loratune.json."""

EXACT = (ExportFormat.peft, ExportFormat.compact)
"""Forms whose tensors are the original's to the bit."""


def _base_name(offline: MetaAdapter) -> str:
    return str(offline.folder.peft.get("base_model_name_or_path") or "")


def as_peft(offline: MetaAdapter) -> Form:
    """PEFT's own format, complete: what was left to a seed is written out."""
    settings = offline.wrapped.config.with_shared_stored(True)
    config = peft_config(offline.wrapped, _base_name(offline), settings)
    facts = _own_facts(offline)
    facts.pop("regenerate", None)
    return config, _all_tensors(offline), facts


def as_plain_lora(offline: MetaAdapter) -> Form:
    """Plain LoRA of one rank: scaling folded into B, short ranks padded with zeros.

    Raises:
        ModelError: if a correction is not a product of two factors, or a module was trained in
            full.
    """
    config, tensors = plain_lora([offline], [1.0])
    return config, tensors, plain_facts([offline])


def as_compact(offline: MetaAdapter) -> Form:
    """Only what was trained; frozen matrices as seed and checksum, to be drawn again.

    Shared matrices are left out as PEFT does (it draws them again too).  ``export format=peft``
    restores the whole file bit for bit, or refuses if the checksum differs.
    """
    wrapped, facts = offline.wrapped, _own_facts(offline)
    shared = shared_keys(wrapped)
    if not shared:
        tensors, recipe = _without_frozen(offline)
        return peft_config(wrapped, _base_name(offline)), tensors, {**facts, "regenerate": recipe}
    tensors = {key: value for key, value in _all_tensors(offline).items() if key not in shared}
    settings = wrapped.config.with_shared_stored(False)
    config = peft_config(wrapped, _base_name(offline), settings)
    return config, tensors, {**facts, "projection": shared_fingerprint(wrapped)}


def _without_frozen(offline: MetaAdapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trained tensors, and how to draw the frozen ones again: a seed and a checksum.

    Raises:
        ModelError: if nothing is frozen, or the recorded seed does not give the same matrices.
    """
    tensors = _all_tensors(offline)
    names = peft_names(offline.wrapped)
    frozen = {
        f"{PREFIX}{names[name]}.{suffix}"
        for name, layer in offline.wrapped.adapters.items()
        for suffix, tensor in layer.adapter_tensors().items()
        if not tensor.requires_grad and f"{PREFIX}{name}.{suffix}" in tensors
    }
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
    drawn = _drawn_again(offline, recipe["seed"])
    if any(not torch.equal(drawn[key], tensors[key]) for key in frozen):
        raise _not_redrawn(offline, "the frozen matrices do not come from the recorded seed")
    return {key: value for key, value in tensors.items() if key not in frozen}, recipe


def _drawn_again(offline: MetaAdapter, seed: Any) -> Mapping[str, Tensor]:
    """Every tensor of a fresh adapter with the recorded seed on the same base."""
    folder = offline.folder
    if not isinstance(seed, int):
        cause = "the adapter does not say which seed its frozen matrices came from"
        raise _not_redrawn(offline, cause)
    reason = folder.config.why_not_redrawn()
    if reason:
        cause = f"{reason}: the frozen matrices cannot be drawn again from a seed"
        raise _not_redrawn(offline, cause)
    model = meta_base(offline.base_folder)
    return adapter_state(wrap_model(model, folder.config, folder.targets, seed=seed, strict=False))


def _not_redrawn(offline: MetaAdapter, cause: str) -> ModelError:
    where = str(offline.folder.path)
    return ModelError(cause, where=where, fix="export format=peft keeps them")


def _own_facts(offline: MetaAdapter) -> dict[str, Any]:
    """``loratune.json`` without the hashes of the files that are about to be written anew."""
    return {key: value for key, value in offline.folder.facts.items() if key != "files"}


def _all_tensors(offline: MetaAdapter) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in adapter_state(offline.wrapped).items()}


FORMS: dict[ExportFormat, Callable[[MetaAdapter], Form]] = {
    ExportFormat.peft: as_peft,
    ExportFormat.portable: as_plain_lora,
    ExportFormat.lora: as_plain_lora,
    ExportFormat.compact: as_compact,
}
