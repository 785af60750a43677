"""Embeddings that an adapter's file brings: of a resized vocabulary, or of a few trained tokens.

PEFT stores them in three ways: both embeddings by itself where the vocabulary was resized, the
rows of ``trainable_token_indices``, and one module for two that ``ensure_weight_tying`` ties.  All
three become modules stored in full, which the rest of the program loads, merges and exports; an
adapter that is tied becomes one on both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter_files.peft_config import PREFIX
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.errors import ModelError
from loratune.models.architectures import names_module
from loratune.models.vocabulary import embedding_names, grow
from loratune.surgery import WrappedModel

_ROWS = ".token_adapter.trainable_tokens_delta"
_RESIZE = (
    "resize the base as in training (resize_token_embeddings), save it with save_pretrained, and "
    "set model.path to it"
)

ReadTensor = Callable[[str], Tensor]
"""Gives a tensor of the base by its name in the model."""


def with_embeddings(model: Any, folder: AdapterFolder, read: ReadTensor) -> AdapterFolder:
    """The adapter with its embeddings as modules stored in full, and the model resized to them.

    Args:
        model: the base, with or without data.
        folder: the adapter as read.
        read: gives a tensor of the base.

    Raises:
        ModelError: if the file does not hold what a resized vocabulary needs.
    """
    ends = embedding_names(model)
    folder = _with_both_ends(model, folder, ends)
    keys = {name: f"{PREFIX}{name}.weight" for name in ends}
    declared = folder.targets.modules_to_save
    weights = {name: folder.tensors[key] for name, key in keys.items() if key in folder.tensors}
    rows = {key: value for key, value in folder.tensors.items() if key.endswith(_ROWS)}
    if not weights and not rows:
        return folder
    where = str(folder.path)
    copies = {
        name
        for name, weight in weights.items()
        if not _is_declared(name, declared) and _same(weight, read(f"{name}.weight"))
    }
    weights = {name: weight for name, weight in weights.items() if name not in copies}
    for key, value in rows.items():
        name = key.removeprefix(PREFIX).removesuffix(_ROWS)
        if name not in ends:
            raise ModelError(
                f"trained tokens of '{name}', which is not an embedding of the base", where=where
            )
        base = _grown(read(f"{name}.weight"), folder.facts.get("vocabulary"))
        weights[name] = _with_rows(base, value, folder.peft, name, where)
    _tie(weights, model, ends, folder.peft, bool(rows))
    _resize(model, weights, ends, where)
    dropped = {*rows, *(keys[name] for name in copies)}
    kept = {key: value for key, value in folder.tensors.items() if key not in dropped}
    added = [name for name in weights if not _is_declared(name, declared)]
    targets = replace(folder.targets, modules_to_save=[*declared, *added])
    tensors = {**_beside_weights(model, weights, read), **kept}
    return replace(
        folder,
        targets=targets,
        tensors={**tensors, **{keys[name]: weight for name, weight in weights.items()}},
    )


def _with_both_ends(model: Any, folder: AdapterFolder, ends: list[str]) -> AdapterFolder:
    """The adapter on both embeddings where PEFT tied what it put on one.

    PEFT names one of the two and stores factors for each: one another's transposes, which can
    still differ in scaling, if the settings give the modules alphas of their own.
    """
    stored = [
        n for n in ends if any(key.startswith(f"{PREFIX}{n}.lora_") for key in folder.tensors)
    ]
    if not (_ties(model, ends, folder.peft) and len(stored) == 2):
        return folder
    modules = folder.targets.modules
    if isinstance(modules, str):
        modules = "|".join([f"(?:{modules})", *map(re.escape, stored)])
    else:
        modules = [*modules, *(name for name in stored if name not in modules)]
    return replace(folder, targets=replace(folder.targets, modules=modules))


def _ties(model: Any, ends: list[str], peft: Mapping[str, Any]) -> bool:
    """Whether PEFT kept the two embeddings of this model one while it trained them."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return tied and len(ends) == 2 and bool(peft.get("ensure_weight_tying"))


def check_continuable(folder: AdapterFolder, wrapped: WrappedModel) -> None:
    """Embeddings that the file brings beside its settings are not what a new run would train.

    Nor is one pair of factors on two embeddings: a new run would train each by itself.

    Raises:
        ModelError: if there are such.
    """
    ends = embedding_names(wrapped.model)
    if _ties(wrapped.model, ends, folder.peft) and set(ends) <= set(wrapped.adapters):
        raise ModelError(
            "the adapter ties its factors on both embeddings (ensure_weight_tying)",
            where=str(folder.path),
            fix="merge it, and train a new adapter on the merged model",
        )
    declared = folder.targets.modules_to_save
    for name in wrapped.saved_modules:
        if not _is_declared(name, declared):
            raise ModelError(
                f"the adapter brings its own '{name}' (a resized vocabulary or trained tokens)",
                where=str(folder.path),
                fix="merge it, and train a new adapter on the merged model",
            )


def _is_declared(name: str, declared: list[str]) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in declared)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other.cpu())


def _grown(base: Tensor, rows: Any) -> Tensor:
    """A weight with as many rows as our own record says that it had in training."""
    missing = rows - base.shape[0] if isinstance(rows, int) else 0
    if missing <= 0:
        return base
    mean = base.float().mean(0, keepdim=True).to(base.dtype)
    return torch.cat([base, mean.expand(missing, -1)])


def _with_rows(
    base: Tensor, rows: Tensor, peft: Mapping[str, Any], name: str, where: str
) -> Tensor:
    """The base's embedding with the trained tokens' rows in their places."""
    indices = peft.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((v for k, v in indices.items() if names_module(str(k), name)), None)
    if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
        raise ModelError("trainable_token_indices names no tokens", where=where)
    if list(rows.shape) != [len(indices), base.shape[1]]:
        raise ModelError(
            f"{list(rows.shape)} numbers for {len(indices)} trained tokens of width "
            f"{base.shape[1]}",
            where=where,
        )
    if not all(0 <= index < base.shape[0] for index in indices):
        raise ModelError(
            f"the vocabulary was resized: token {max(indices)} was trained, the base has "
            f"{base.shape[0]:,} rows",
            where=where,
            fix=_RESIZE,
        )
    full = base.detach().cpu().float().clone()
    full[torch.tensor(indices)] = rows.float()
    return full


def _tie(
    weights: dict[str, Tensor],
    model: Any,
    ends: list[str],
    peft: Mapping[str, Any],
    are_rows: bool,
) -> None:
    """One value for both embeddings where PEFT ties what it trained."""
    if _ties(model, ends, {"ensure_weight_tying": are_rows or peft.get("ensure_weight_tying")}):
        for name, other in (ends, reversed(ends)):
            if name in weights:
                weights.setdefault(other, weights[name])


def _resize(model: Any, weights: Mapping[str, Tensor], ends: list[str], where: str) -> None:
    """Give the model as many rows as the stored embeddings have.

    Raises:
        ModelError: if they disagree, or only one of two is stored.
    """
    base = int(model.get_input_embeddings().weight.shape[0])
    sizes = {weight.shape[0] for weight in weights.values()}
    if sizes <= {base}:
        return
    missing = [name for name in ends if name not in weights]
    if len(sizes) > 1 or missing:
        lacking = f", and the file does not hold '{missing[0]}'" if missing else ""
        raise ModelError(
            f"the vocabulary was resized: the adapter's embeddings have "
            f"{' and '.join(f'{size:,}' for size in sorted(sizes))} rows, the base's {base:,}"
            f"{lacking}",
            where=where,
            fix=_RESIZE,
        )
    (rows,) = sizes
    grow(model, rows)


def _beside_weights(
    model: nn.Module, weights: Mapping[str, Tensor], read: ReadTensor
) -> dict[str, Tensor]:
    """What a stored embedding has beside its weight (a head's bias), from the base."""
    return {
        f"{PREFIX}{name}.{suffix}": read(f"{name}.{suffix}")
        for name in weights
        for suffix in model.get_submodule(name).state_dict()
        if suffix != "weight"
    }
