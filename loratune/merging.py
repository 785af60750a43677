"""One weight plus its corrections: summed in fp32 once, rounded once, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.adapters.base import Adapter
from loratune.errors import MergeError
from loratune.offline_adapter import probe_outputs


@dataclass(frozen=True)
class ModuleProof:
    """What a merge did to one module.

    Attributes:
        module: its name.
        delta_norm: Frobenius norm of the correction.
        residual: ‖(W' − W) − ΔW‖ / ‖ΔW‖ after rounding to the output dtype.
        delta_kept: share of the correction that survived the rounding, ⟨W' − W, ΔW⟩ / ‖ΔW‖².
        probe_error: largest difference between ΔW and the layer's own forward on random inputs,
            relative to the output.
    """

    module: str
    delta_norm: float
    residual: float
    delta_kept: float
    probe_error: float


PROBE_TOLERANCE = 1e-4


@torch.no_grad()
def merged_weight(
    weight: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype
) -> tuple[Tensor, ModuleProof]:
    """W + Σ ΔW in ``dtype``, with its proof.

    Args:
        weight: the stored base weight.
        adapters: the module's corrections, one per adapter being merged.
        dtype: of the result.

    Raises:
        MergeError: if the result is not finite or does not prove itself.
    """
    name = adapters[0].shape.name
    base = weight.float()
    deltas = [adapter.delta_weight().float() for adapter in adapters]
    probe_error = max(_probe(a, d) for a, d in zip(adapters, deltas, strict=True))
    delta = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(dim=0)
    if delta.shape != base.shape:
        raise MergeError(
            f"the base weight is {list(base.shape)}, the correction {list(delta.shape)}", where=name
        )
    merged = (base + delta).to(dtype)
    if not bool(torch.isfinite(merged).all()):
        raise MergeError("the merged weight is NaN or infinite", where=name, fix="merge.dtype=float32")
    moved = merged.float() - base
    norm = float(delta.norm())
    error = moved - delta
    _refuse_beyond_rounding(error, merged, base, delta, name)
    squared = float((delta.double() ** 2).sum())
    kept = float((moved.double() * delta.double()).sum()) / squared if squared else 1.0
    residual = float(error.norm()) / norm if norm else 0.0
    return merged, ModuleProof(name, norm, residual, kept, probe_error)


def _probe(adapter: Adapter, delta: Tensor) -> float:
    difference, scale = probe_outputs(adapter, delta)
    error = difference / scale if scale else difference
    if not error <= PROBE_TOLERANCE:
        raise MergeError(
            f"the merged correction is not the adapter's: outputs differ by {error:.2g}",
            where=adapter.shape.name,
        )
    return error


def _refuse_beyond_rounding(
    error: Tensor, merged: Tensor, base: Tensor, delta: Tensor, name: str
) -> None:
    """Every element of W' must be W + ΔW to within the rounding of the two sums."""
    step, single = torch.finfo(merged.dtype).eps, torch.finfo(torch.float32).eps
    bound = merged.float().abs() * step + (base.abs() + delta.abs()) * (2 * single)
    bound += torch.finfo(merged.dtype).smallest_normal
    if bool((error.abs() > bound).any()):
        raise MergeError(
            f"W' − W differs from ΔW by {float(error.abs().max()):.2g}, beyond rounding", where=name
        )
