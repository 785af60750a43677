"""Where the base's files hold what an adapter changes, and what must part there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loratune.adapters.low_rank import LowRank
from loratune.errors import ModelError
from loratune.models.build import meta_model, read_transformers_config
from loratune.models.stored_names import StoredNames, shared_names
from loratune.surgery import WrappedModel, trained_values

_LISTED = 3


def require_places(base_folder: Path, names: StoredNames, wrapped: WrappedModel) -> None:
    """Check that a merge can write every change of an adapter into the base's files.

    Only names and shapes are looked at, so that it can be done before anything is trained.

    Args:
        base_folder: the base model's files.
        names: what they call the parameters of the model.
        wrapped: the model with its adapter.

    Raises:
        ModelError: naming the layers that have no place in the files, and why.
    """
    parted = parted_names(base_folder, names, wrapped)
    problems = {
        name: problem
        for name in (*changed_parameters(wrapped), *sorted(parted))
        if (problem := names.problem_of(name, alone=name in parted))
    }
    if problems:
        raise ModelError(
            f"what is trained could not be merged into {_listed(problems)}: "
            f"{next(iter(problems.values()))}",
            where=str(base_folder),
            fix="leave these layers out with targets.exclude",
        )


def changed_parameters(wrapped: WrappedModel) -> list[str]:
    """Names, in the plain model, of the parameters and buffers that a merge gives new values."""
    weights = [layer.shape.parameter for layer in wrapped.adapters.values()]
    weights += [f"{name}.bias" for name, layer in wrapped.adapters.items() if layer.corrects_bias]
    return list(dict.fromkeys([*weights, *trained_values(wrapped)]))


def parted_names(base_folder: Path, names: StoredNames, wrapped: WrappedModel) -> frozenset[str]:
    """Parameters that share a tensor in the base and must each have their own once merged.

    A configuration that ties nothing (``tie_word_embeddings: false``) parts more than what is
    adapted: a head's bias, a second embedding.  All of them are named.

    Raises:
        ModelError: if an adapter changes one of two layers that no setting parts.
    """
    changed = [name for name in changed_parameters(wrapped) if name in names.shared]
    changed = [name for name in changed if not _stay_equal(wrapped, names.shared[name])]
    if not changed:
        return frozenset()
    config = read_transformers_config(base_folder)
    config.tie_word_embeddings = False
    still_shared = shared_names(meta_model(config, str(base_folder)))
    stuck = [name for name in changed if name in still_shared]
    if stuck:
        others = [name for name in still_shared[stuck[0]] if name != stuck[0]]
        raise ModelError(
            f"'{stuck[0]}' and '{others[0]}' are one tensor in this model, and an adapter changes "
            "them by different amounts",
            where=str(base_folder),
            fix="leave these layers out with targets.exclude",
        )
    return frozenset(names.shared.keys() - still_shared.keys())


def _stay_equal(wrapped: WrappedModel, shared: tuple[str, ...]) -> bool:
    """Whether all parameters of one tensor are trained in full, or corrected, alike."""
    trained = trained_values(wrapped)
    values: list[tuple[Tensor, ...]] = []
    for name in shared:
        adapter = wrapped.adapters.get(name.rpartition(".")[0])
        if name in trained:
            values.append((trained[name],))
        elif isinstance(adapter, LowRank):
            values.append(tuple(map(torch.as_tensor, adapter.products())))
        else:
            return False
    return all(
        len(value) == len(values[0]) and all(map(torch.equal, values[0], value))
        for value in values[1:]
    )


def _listed(problems: Mapping[str, str]) -> str:
    names = [f"'{name}'" for name in problems]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
