"""Adapters whose ΔW is a product of two narrow matrices."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from loratune.adapters.base import Adapter, RowWriter, pieces_of
from loratune.adapters.config import LayerKind


class LowRank(Adapter):
    """ΔW = s · B A with A (r, in) and B (out, r), whatever W is.

    From the factors follow the rows of ΔW and the export as plain LoRA.
    """

    reads_base: ClassVar[bool] = False

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and the scale s.

        The scale is apart because it is multiplied last, as PEFT does: that decides the last bit.
        """

    def stacked_factors(self) -> tuple[Tensor, Tensor, float]:
        """A (experts, r, in) and B (experts, out, r) of stacked experts, and the scale s."""
        raise NotImplementedError

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) whose product B A is the whole correction, scaling included."""
        A, B, scale = self.factors()
        return A, B * scale

    def adapted_weight(self) -> Tensor:
        weight = self.weight
        if self.merged or not self.enabled:
            return weight
        left, right, scale = self._stacked_products()
        # In the factors' own precision, and rounded once, as when it is merged.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight.to(left.dtype), left, right, alpha=scale).to(weight.dtype)

    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        if self.shape.is_stacked:
            left, right, scale = self._stacked_products()
            pieces = pieces_of(rows, left.shape[1])
            return torch.cat([torch.mm(left[e][part], right[e]) for e, part in pieces]).mul_(scale)
        left, right, scale = self.products()
        return torch.mm(left[rows], right).mul_(scale)

    def row_writer(self, weight: Tensor) -> RowWriter:
        """The factors are computed once, and every block is multiplied in place."""
        if self.shape.is_stacked:
            return super().row_writer(weight)
        left, right, scale = self.products()

        def write(rows: slice, out: Tensor) -> None:
            torch.mm(left[rows], right, out=out)
            if scale != 1:
                out.mul_(scale)

        return write

    def _stacked_products(self) -> tuple[Tensor, Tensor, float]:
        """The same for every expert: (experts, rows, r) and (experts, r, columns)."""
        A, B, scale = self.stacked_factors()
        if self.shape.kind is LayerKind.experts:
            return B, A, scale
        return A.transpose(1, 2), B.transpose(1, 2), scale

    def products(self) -> tuple[Tensor, Tensor, float]:
        """Two matrices whose product is ΔW / s in the weight's own layout, and s."""
        A, B, scale = self.factors()
        is_linear = self.shape.kind is LayerKind.linear
        return (B, A, scale) if is_linear else (A.T, B.T, scale)
