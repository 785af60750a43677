"""What the fused layers share: one call's facts and the products around a frozen weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.adapters.kernels.dropout import Dropout


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a fused layer, apart from its tensors."""

    scaling: float
    transposed: bool
    """The weight is stored (in, out), as GPT-2's Conv1D does."""
    dropout: Dropout | None
    dtype: torch.dtype
    """What the products compute in and the output has: the weight's, or autocast's."""

    @classmethod
    def begin(
        cls, x: Tensor, weight: Tensor, scaling: float, transposed: bool, dropout_p: float
    ) -> Call:
        """Draw the dropout mask's seed and settle the dtype."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        return cls(scaling, transposed, Dropout.draw(dropout_p), dtype)

    @property
    def factor(self) -> float:
        """Scaling of the correction with dropout's 1/(1 - p) in it."""
        return self.scaling * (self.dropout.scale if self.dropout else 1.0)

    def rows(self, x: Tensor) -> Tensor:
        """(..., width) as (rows, width) in the computing dtype; a view wherever possible."""
        return x.reshape(-1, x.shape[-1]).to(self.dtype)

    def forward_weight(self, weight: Tensor) -> Tensor:
        """The weight as (in, out)."""
        weight = weight.to(self.dtype)
        return weight if self.transposed else weight.t()


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The frozen layer: x (n, in), weight (in, out) → (n, out)."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias.to(x.dtype), x, weight)


def narrow(x: Tensor, factor: Tensor, dropout: Dropout | None) -> Tensor:
    """drop(x) Aᵀ without dropout's 1/(1 - p): x (n, in), A (r, in) → (n, r)."""
    if dropout is None:
        return torch.mm(x, factor.t())
    h = x.new_empty(x.shape[0], factor.shape[0])
    for rows, keep in dropout.masks(x):
        torch.mm(keep.mul_(x[rows]), factor.t(), out=h[rows])
    return h


def add_widened(
    grad: Tensor, narrow_grad: Tensor, factor: Tensor, alpha: float, dropout: Dropout | None
) -> None:
    """Add in place: grad += alpha · drop'(t A) with t (n, r), A (r, in), grad (n, in)."""
    if dropout is None:
        grad.addmm_(narrow_grad, factor, alpha=alpha)
        return
    for rows, keep in dropout.masks(grad):
        grad[rows].addcmul_(keep, narrow_grad[rows] @ factor, value=alpha)
