"""An exported adapter, read back from its files, against the original."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loratune.adapter_files.offline import MetaAdapter, attach
from loratune.adapter_files.peft_format import AdapterFolder, read_adapter
from loratune.config.schema import Verify
from loratune.errors import MergeError
from loratune.merging.logits import prove_same_logits, wants_logits
from loratune.models.weights import tensor_entries
from loratune.surgery import adapter_state

TOLERANCE = 1e-6


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


def _prove_logits(
    original: MetaAdapter, exported: AdapterFolder, *, exact: bool, verify: Verify
) -> dict[str, Any] | None:
    if not wants_logits(verify, [original.folder], tensor_entries(original.base_folder)):
        return None
    return asdict(prove_same_logits(original.base_folder, original.folder, exported, exact=exact))
