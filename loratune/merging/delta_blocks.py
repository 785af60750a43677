"""ΔW of a module some rows at a time, checked against what the layer computes with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loratune.adapters.base import Adapter
from loratune.adapters.config import LayerKind

PROBES = 8
"""Random inputs, or token ids, on which a layer is asked for its own output."""


class DeltaBlocks:
    """One adapter's ΔW, block by block: the whole of it is never in memory.

    The layer's own ``delta(x)`` on random inputs is compared with x ΔWᵀ: a sign, a transpose or a
    scaling lost on the way to the merged weight shows there.

    Attributes:
        dtype: the adapter's.
        device: where the adapter is.
    """

    def __init__(self, adapter: Adapter) -> None:
        A, B, self._scale = adapter.factors()
        self.dtype, self.device = A.dtype, A.device
        self._kind = adapter.shape.kind
        # Rows of ΔW are B's rows, or A's columns where the weight lies input first.
        is_linear = self._kind is LayerKind.linear
        self._left, self._right = (B, A) if is_linear else (A.T, B.T)
        self._inputs = _probe_inputs(adapter).to(self.device)
        self._expected = adapter.delta(self._inputs)
        self._got = torch.zeros_like(self._expected)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight, in its own layout."""
        return self._left.shape[0], self._right.shape[1]

    def block(self, rows: slice, out: Tensor) -> None:
        """Write ``rows`` of ΔW to ``out``, (rows, columns) in the adapter's dtype."""
        torch.mm(self._left[rows], self._right, out=out)
        if self._scale != 1:
            out.mul_(self._scale)
        if self._kind is LayerKind.linear:
            self._got[:, rows] = nn.functional.linear(self._inputs, out.to(self._inputs.dtype))
        elif self._kind is LayerKind.conv1d:
            self._got += self._inputs[:, rows] @ out.to(self._inputs.dtype)
        else:
            here = (self._inputs >= rows.start) & (self._inputs < rows.stop)
            self._got[here] = out[self._inputs[here] - rows.start]

    @property
    def probe_error(self) -> float:
        """After the last block: largest difference between the two outputs, relative to them."""
        difference = float((self._expected - self._got).abs().max())
        scale = float(self._expected.abs().max())
        return difference / scale if scale else difference


def row_slices(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Consecutive rows of a matrix, about ``elements`` numbers at a time."""
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _probe_inputs(adapter: Adapter) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if adapter.shape.kind is LayerKind.embedding:
        return torch.randint(0, adapter.shape.in_features, (PROBES,), generator=generator)
    return torch.randn(PROBES, adapter.shape.in_features, generator=generator)
