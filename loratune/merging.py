"""One weight plus its corrections: summed in fp32 once, rounded once, measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
BLOCK = 1 << 16
"""Elements that are summed and proved at a time: the intermediate results stay in the cache."""


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
    deltas = [adapter.delta_weight().float() for adapter in adapters]
    probe_error = max(_probe(a, d) for a, d in zip(adapters, deltas, strict=True))
    delta = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(dim=0)
    if delta.shape != weight.shape:
        raise MergeError(
            f"the base weight is {list(weight.shape)}, the correction {list(delta.shape)}",
            where=name,
        )
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = BLOCK if weight.device.type == "cpu" else max(1, weight.numel())
    flat = (weight.reshape(-1), delta.reshape(-1), merged.view(-1))
    blocks = zip(*(torch.split(tensor, size) for tensor in flat), strict=True)
    room = [torch.empty(min(size, weight.numel()), device=weight.device) for _ in range(3)]
    parts = [_merge_block(base, change, out, room) for base, change, out in blocks]
    total = _Block(*(sum(values) for values in zip(*parts, strict=True)))
    _judge(total, name)
    norm = math.sqrt(total.delta_squared)
    kept = total.moved_delta / total.delta_squared if norm else 1.0
    residual = math.sqrt(total.error_squared) / norm if norm else 0.0
    return merged, ModuleProof(name, norm, residual, kept, probe_error)


class _Block(NamedTuple):
    """What one block adds to the proof: sums over its elements, and whether it failed."""

    delta_squared: float
    error_squared: float
    moved_delta: float
    beyond_rounding: float


def _merge_block(weight: Tensor, delta: Tensor, out: Tensor, room: Sequence[Tensor]) -> _Block:
    """Write W + ΔW of one block to ``out`` and compare what was written with what was meant.

    ``room`` are three fp32 tensors of the block's size: fresh ones would cost more than the sums.
    """
    base, merged, error = (tensor[: weight.numel()] for tensor in room)
    base.copy_(weight)
    out.copy_(torch.add(base, delta, out=merged))
    merged.copy_(out)
    torch.sub(merged, base, out=error)
    moved_delta = torch.dot(error, delta)  # so far W' − W
    error.sub_(delta)
    sums = torch.stack([torch.dot(delta, delta), torch.dot(error, error), moved_delta]).tolist()
    # Within the rounding of the two sums, and of numbers below the normal ones.
    step, single = torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps
    bound = merged.abs_().mul_(step).add_(torch.finfo(out.dtype).smallest_normal)
    bound.add_(base.abs_(), alpha=2 * single)
    bound.add_(torch.abs(delta, out=base), alpha=2 * single)
    beyond = float(error.abs_().sub_(bound).max()) > 0
    return _Block(sums[0], sums[1], sums[2], beyond)


def _judge(total: _Block, name: str) -> None:
    # A single NaN or infinity in W' makes a sum one.
    if not all(math.isfinite(value) for value in total):
        raise MergeError(
            "the merged weight is NaN or infinite", where=name, fix="merge.dtype=float32"
        )
    if total.beyond_rounding:
        raise MergeError("W' − W differs from ΔW beyond rounding", where=name)


def _probe(adapter: Adapter, delta: Tensor) -> float:
    difference, scale = probe_outputs(adapter, delta)
    error = difference / scale if scale else difference
    if not error <= PROBE_TOLERANCE:
        raise MergeError(
            f"the merged correction is not the adapter's: outputs differ by {error:.2g}",
            where=adapter.shape.name,
        )
    return error
