"""Adapters whose ΔW is a product of two narrow matrices."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from loratune.adapters.base import Adapter, RowWriter
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

    def low_rank_factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) whose product B A is the whole correction, scaling included."""
        A, B, scale = self.factors()
        return A, B * scale

    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        left, right, scale = self.products()
        return torch.mm(left[rows], right).mul_(scale)

    def row_writer(self, weight: Tensor) -> RowWriter:
        """The factors are computed once, and every block is multiplied in place."""
        left, right, scale = self.products()

        def write(rows: slice, out: Tensor) -> None:
            torch.mm(left[rows], right, out=out)
            if scale != 1:
                out.mul_(scale)

        return write

    def products(self) -> tuple[Tensor, Tensor, float]:
        """Two matrices whose product is ΔW / s in the weight's own layout, and s."""
        A, B, scale = self.factors()
        is_linear = self.shape.kind is LayerKind.linear
        return (B, A, scale) if is_linear else (A.T, B.T, scale)
