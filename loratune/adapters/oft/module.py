"""OFT's layer (arXiv:2306.07280): W applied to inputs that are rotated block by block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import Adapter, LayerPlan, RowWriter, data_device
from loratune.adapters.config import LayerKind
from loratune.adapters.oft.config import OFTConfig


class Rotation(nn.Module):
    """The angles of one layer: for each block the upper half of its skew-symmetric matrix.

    Attributes:
        weight: (blocks, b·(b − 1)/2), zero for no rotation.
    """

    def __init__(self, width: int, block: int, terms: int, device: torch.device) -> None:
        super().__init__()
        self.block, self.terms = block, terms
        angles = torch.zeros(width // block, block * (block - 1) // 2, device=device)
        self.weight = nn.Parameter(angles)

    def matrices(self) -> Tensor:
        """R of every block, (blocks, b, b)."""
        count, b = len(self.weight), self.block
        rows, columns = torch.triu_indices(b, b, 1, device=self.weight.device)
        Q = self.weight.new_zeros(count, b, b)
        Q[:, rows, columns] = self.weight
        Q = Q - Q.transpose(-2, -1)
        eye = torch.eye(b, device=Q.device, dtype=Q.dtype)
        if self.terms == 0:
            solved: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
            return solved
        R = eye.repeat(count, 1, 1).add_(Q, alpha=2.0)
        power = torch.bmm(Q, Q)
        R.add_(power, alpha=2.0)
        for _ in range(3, self.terms - 1):
            power = torch.bmm(power, Q)
            R.add_(power, alpha=2.0)
        return R.add_(torch.bmm(power, Q))


class OFT(Adapter):
    """y = W (x R) + bias, the inputs of each block rotated together; at first R = I."""

    def __init__(self, plan: LayerPlan, config: OFTConfig) -> None:
        super().__init__(plan, config)
        width = plan.shape.in_features
        block, device = config.block_of(width), data_device(self.stored_weight)
        self.oft_R = Rotation(width, block, config.cayley_terms, device)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        wide = x.to(self.oft_R.weight.dtype)
        weight = self.weight if self.shape.kind is LayerKind.linear else self.weight.T
        return F.linear(self._rotated(wide) - wide, weight.to(wide.dtype))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        rotated = self._rotated(x.to(self.oft_R.weight.dtype))
        return self._base(rotated.to(x.dtype))

    def fused_forward(self, x: Tensor) -> Tensor:
        """The same without a product that is not used; autograd keeps x and the rotations."""
        return self.output(x, x)

    def _rotated(self, x: Tensor) -> Tensor:
        """Each block of x (..., in) times its R."""
        with torch.autocast(x.device.type, enabled=False):
            blocks = x.reshape(*x.shape[:-1], len(self.oft_R.weight), self.oft_R.block)
            return torch.einsum("...rk,rkc->...rc", blocks, self.oft_R.matrices()).reshape(x.shape)

    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        return self._rows(weight, rows, self._turns())

    def row_writer(self, weight: Tensor) -> RowWriter:
        """The rotations are computed once."""
        turns = self._turns()

        def write(rows: slice, out: Tensor) -> None:
            out.copy_(self._rows(weight, rows, turns))

        return write

    def _turns(self) -> Tensor:
        """R − I of every block."""
        R = self.oft_R.matrices()
        return R - torch.eye(self.oft_R.block, device=R.device, dtype=R.dtype)

    def _rows(self, weight: Tensor, rows: slice, turns: Tensor) -> Tensor:
        """Rows of W (R − I)ᵀ; of (R − I) W where the weight is stored input first."""
        b, dtype = self.oft_R.block, turns.dtype
        if self.shape.kind is LayerKind.linear:
            blocks = weight[rows].to(dtype).reshape(-1, len(turns), b)
            return torch.einsum("nrk,rck->nrc", blocks, turns).reshape(len(blocks), -1)
        first, last = rows.start // b, -(-rows.stop // b)
        blocks = weight[first * b : last * b].to(dtype).reshape(last - first, b, -1)
        turned = torch.bmm(turns[first:last], blocks).reshape(-1, weight.shape[1])
        return turned[rows.start - first * b : rows.stop - first * b]

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """Every angle times ``scale``: a turn stays a turn, which W + scale · ΔW would not be."""
        return {"oft_R.weight": self.oft_R.weight * scale}

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"oft_R.weight": self.oft_R.weight}
