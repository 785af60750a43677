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
from loratune.merging.delta_blocks import DeltaBlocks, row_slices
from loratune.models.weights import is_finite


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
BLOCK = 1 << 17
"""Elements that are summed and proved at a time: the intermediate results stay in the cache."""


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
    merged = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return merged, _walk(weight, adapters, merged, writes=True)


@torch.no_grad()
def replaced_weight(
    weight: Tensor, trained: Tensor, dtype: torch.dtype, parameter: str
) -> tuple[Tensor, list[ModuleProof]]:
    """A tensor that was trained in full, rounded once to ``dtype``, with its proof.

    Args:
        weight: the stored base tensor.
        trained: its value after training.
        dtype: of the result.
        parameter: its name in the model; a weight is named by its module.

    Returns:
        The result, and its proof; none where the vocabulary was resized.

    Raises:
        MergeError: if the result is not finite.
    """
    merged = trained.to(dtype)
    name = parameter.removesuffix(".weight")
    if not is_finite(merged):
        raise MergeError(
            "the merged weight is NaN or infinite", where=name, fix="merge.dtype=float32"
        )
    if weight.shape != trained.shape:
        return merged, []
    delta_squared = error_squared = moved_delta = 0.0
    flat = [one.reshape(-1) for one in (weight, trained, merged)]
    for begin in range(0, merged.numel(), BLOCK):
        base, after, stored = (one[begin : begin + BLOCK].float() for one in flat)
        delta, moved = after - base, stored - base
        delta_squared += float(torch.dot(delta, delta))
        moved_delta += float(torch.dot(moved, delta))
        error_squared += float((moved - delta).square().sum())
    norm = math.sqrt(delta_squared)
    kept = moved_delta / delta_squared if norm else 1.0
    residual = math.sqrt(error_squared) / norm if norm else 0.0
    return merged, [ModuleProof(name, norm, residual, kept, 0.0)]


def prove_weight(weight: Tensor, adapters: Sequence[Adapter], merged: Tensor) -> ModuleProof:
    """Prove a weight that was merged before: it must be W + Σ ΔW, within one rounding.

    Raises:
        MergeError: if it is not.
    """
    return _walk(weight, adapters, merged, writes=False)


@torch.no_grad()
def _walk(
    weight: Tensor, adapters: Sequence[Adapter], merged: Tensor, *, writes: bool
) -> ModuleProof:
    name = adapters[0].shape.name
    if merged.shape != weight.shape:
        raise MergeError(
            f"the base weight is {list(weight.shape)}, the merged one {list(merged.shape)}",
            where=name,
        )
    corrections = [DeltaBlocks(adapter, weight) for adapter in adapters]
    for correction in corrections:
        if correction.shape != weight.shape:
            raise MergeError(
                f"the base weight is {list(weight.shape)}, the correction {list(correction.shape)}",
                where=name,
            )
    weight, merged = (one.view(-1, one.shape[-1]) for one in (weight, merged))
    scratch = _Scratch(weight, corrections)
    parts = []
    for rows in row_slices(weight.shape[0], weight.shape[1], scratch.elements):
        base, total, error = scratch.blocks(rows)
        base.copy_(weight[rows])
        delta = scratch.delta(rows, base, corrections)
        if writes:
            merged[rows] = torch.add(base, delta, out=total)
        total.copy_(merged[rows])
        parts.append(_prove_block(base, delta, total, error, merged.dtype))
    whole = _Sums(*(sum(values) for values in zip(*parts, strict=True)))
    probe_error = max(correction.probe_error() for correction in corrections)
    _judge(whole, probe_error, name)
    norm = math.sqrt(whole.delta_squared)
    kept = whole.moved_delta / whole.delta_squared if norm else 1.0
    residual = math.sqrt(whole.error_squared) / norm if norm else 0.0
    return ModuleProof(name, norm, residual, kept, probe_error)


class _Scratch:
    """Memory for one block's intermediate results, used again for every block.

    Fresh tensors would cost more than the sums: the system clears every page it hands out.
    """

    def __init__(self, weight: Tensor, corrections: Sequence[DeltaBlocks]) -> None:
        rows, self._columns = weight.shape
        on_cpu = weight.device.type == "cpu"
        self.elements = max(BLOCK if on_cpu else rows * self._columns, self._columns)
        self._summed = [self._new(torch.float32, weight.device) for _ in range(4)]
        self._single = [self._new(one.dtype, one.device) for one in corrections]

    def _new(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(self.elements, dtype=dtype, device=device)

    def delta(self, rows: slice, base: Tensor, corrections: Sequence[DeltaBlocks]) -> Tensor:
        """``rows`` of Σ ΔW in fp32; ``base`` is W's rows."""
        count = rows.stop - rows.start
        total = self._block(self._summed[0], count)
        for number, (correction, memory) in enumerate(zip(corrections, self._single, strict=True)):
            single = self._block(memory, count)
            correction.block(rows, base, single)
            if len(corrections) == 1 and single.dtype is torch.float32:
                return single.to(total.device)
            total = total.copy_(single) if number == 0 else total.add_(single.to(total.device))
        return total

    def blocks(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Three fp32 tensors of the shape of ``rows``."""
        count = rows.stop - rows.start
        first, second, third = (self._block(memory, count) for memory in self._summed[1:])
        return first, second, third

    def _block(self, memory: Tensor, count: int) -> Tensor:
        return memory[: count * self._columns].view(count, self._columns)


class _Sums(NamedTuple):
    """What one block adds to the proof: sums over its elements, and whether it failed."""

    delta_squared: float
    error_squared: float
    moved_delta: float
    beyond_rounding: float


def _prove_block(
    base: Tensor, delta: Tensor, merged: Tensor, error: Tensor, dtype: torch.dtype
) -> _Sums:
    """Compare what was written with what was meant; all but ``delta`` are written over.

    Args:
        base: W in fp32.
        delta: Σ ΔW in fp32.
        merged: W' as it is stored, in fp32.
        error: memory for a block.
        dtype: in which W' is stored.
    """
    torch.sub(merged, base, out=error)
    flat, meant = error.view(-1), delta.view(-1)
    moved_delta = torch.dot(flat, meant)  # so far W' − W
    error.sub_(delta)
    sums = [torch.dot(meant, meant), torch.dot(flat, flat), moved_delta]
    # W + ΔW is rounded twice, to fp32 and to W's dtype, which eps · |W'| bounds.  Taking W away
    # again adds nothing: either the difference is exact, or |W'| > |ΔW| leaves room for it.
    beyond = error.abs_().add_(merged.abs_(), alpha=-torch.finfo(dtype).eps)
    first, second, third, most = torch.stack([*sums, beyond.max()]).tolist()
    return _Sums(first, second, third, most > torch.finfo(dtype).smallest_normal)


def _judge(whole: _Sums, probe_error: float, name: str) -> None:
    if not probe_error <= PROBE_TOLERANCE:
        raise MergeError(
            f"the merged correction is not the adapter's: outputs differ by {probe_error:.2g}",
            where=name,
        )
    # A single NaN or infinity in W' makes a sum one.
    if not all(math.isfinite(value) for value in whole):
        raise MergeError(
            "the merged weight is NaN or infinite", where=name, fix="merge.dtype=float32"
        )
    if whole.beyond_rounding:
        raise MergeError("W' − W differs from ΔW beyond rounding", where=name)
