"""An exported adapter, read back from its files, against the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loratune.adapter_files.offline import MetaAdapter, attach
from loratune.adapter_files.peft_format import AdapterFolder, read_adapter
from loratune.adapter_files.plain_lora import factors_of, summed_layers
from loratune.adapters.base import Adapter
from loratune.adapters.low_rank import LowRank
from loratune.config.schema import Verify
from loratune.errors import MergeError
from loratune.merging.delta_blocks import row_slices
from loratune.merging.logits import prove_same_logits, wants_logits
from loratune.models.weights import tensor_entries
from loratune.surgery import adapter_state

TOLERANCE = 1e-6
_BLOCK = 1 << 22
"""Elements of ΔW that are compared at a time."""


def prove_export(
    original: MetaAdapter, folder: Path, *, exact: bool, verify: Verify
) -> dict[str, Any]:
    """Prove that what lies in ``folder`` computes what the original does.

    ΔW of every module always; probe logits where the base fits in memory.

    Args:
        original: the adapter on its base's names and shapes.
        folder: the exported form, complete but not yet published.
        exact: every tensor must be equal to the bit, else ΔW to 1e-6 of its largest entry.
        verify: weights, logits, or auto.

    Raises:
        MergeError: if it does not.
    """
    exported = read_adapter(folder)
    again = attach(original.base_folder, exported)
    proof = _prove_equal(original, again) if exact else _prove_deltas(original, again)
    logits = _prove_logits(original, exported, exact=exact, verify=verify)
    return {**proof, "logits": logits}


def _prove_equal(original: MetaAdapter, exported: MetaAdapter) -> dict[str, Any]:
    """Every tensor of the model, frozen ones too, is the same to the bit."""
    before, after = adapter_state(original.wrapped), adapter_state(exported.wrapped)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            raise MergeError("the exported form holds another tensor", where=name)
    _compare_scaling(original, exported)
    return {"worst_relative_difference": 0.0, "module": "", "tolerance": 0.0}


def _compare_scaling(original: MetaAdapter, exported: MetaAdapter) -> None:
    for name, layer in original.wrapped.adapters.items():
        if layer.scaling != exported.wrapped.adapters[name].scaling:
            raise MergeError("the exported form scales differently", where=name)


@torch.no_grad()
def _prove_deltas(original: MetaAdapter, exported: MetaAdapter) -> dict[str, Any]:
    """Largest difference of every module's ΔW, relative to its largest entry.

    Only corrections that do not depend on the base have an inexact form.
    """
    if original.wrapped.adapters.keys() != exported.wrapped.adapters.keys():
        raise MergeError("the exported form adapts other layers", where=str(exported.folder.path))
    worst, where = 0.0, ""
    for name, layer in original.wrapped.adapters.items():
        before, after = layer.delta_weight(), exported.wrapped.adapters[name].delta_weight()
        scale = float(before.abs().max()) or 1.0
        error = float((before - after).abs().max()) / scale
        if not error <= TOLERANCE:
            raise MergeError(f"the exported form's ΔW differs by {error:.2g}", where=name)
        if error >= worst:
            worst, where = error, name
    return {"worst_relative_difference": worst, "module": where, "tolerance": TOLERANCE}


@torch.no_grad()
def prove_sum(
    originals: Sequence[MetaAdapter], weights: Sequence[float], folder: Path
) -> dict[str, Any]:
    """Prove, in double precision, that what lies in ``folder`` is Σ weight · ΔW.

    Args:
        originals: the adapters on their base's names and shapes.
        weights: one an adapter.
        folder: their sum as plain LoRA, complete but not yet published.

    Returns:
        The largest difference of a module, relative to the largest entry of any of its terms.

    Raises:
        MergeError: if it is not.
    """
    summed = attach(originals[0].base_folder, read_adapter(folder))
    layers = summed_layers(originals)
    if summed.wrapped.adapters.keys() != layers.keys():
        raise MergeError("the sum adapts other layers", where=str(folder.name))
    worst, where = 0.0, ""
    for name, terms in layers.items():
        expected = [(layer, w) for layer, w in zip(terms, weights, strict=True) if layer]
        error = _sum_error(summed.wrapped.adapters[name], expected)
        if not error <= TOLERANCE:
            raise MergeError(f"the sum's ΔW differs by {error:.2g}", where=name)
        if error >= worst:
            worst, where = error, name
    return {"worst_relative_difference": worst, "module": where, "tolerance": TOLERANCE}


def _sum_error(summed: Adapter, terms: Sequence[tuple[LowRank, float]]) -> float:
    """Largest difference of a module's ΔW from its terms', some rows at a time."""
    assert isinstance(summed, LowRank)
    A, B = (factor.double() for factor in factors_of(summed))
    pairs = [([f.double() for f in factors_of(layer)], weight) for layer, weight in terms]
    difference = scale = 0.0
    for rows in row_slices(B.shape[0], A.shape[1], _BLOCK):
        products = [weight * (part[1][rows] @ part[0]) for part, weight in pairs]
        error = B[rows] @ A - sum(products)
        difference = max(difference, float(error.abs().max()))
        scale = max(scale, *(float(product.abs().max()) for product in products))
    return difference / scale if scale else difference


def _prove_logits(
    original: MetaAdapter, exported: AdapterFolder, *, exact: bool, verify: Verify
) -> dict[str, Any] | None:
    if not wants_logits(verify, [original.folder], tensor_entries(original.base_folder)):
        return None
    return asdict(prove_same_logits(original.base_folder, original.folder, exported, exact=exact))
