"""What the fused layers share: the products of a frozen weight with a correction beside it.

With ``W`` (out, in) frozen, ``A`` (r, in), ``B`` (out, r) and a factor ``f``:
``y = x Wᵀ + c + f · drop(x) Aᵀ Bᵀ`` and ``∂x = g W + f · drop'(g B A)``, each either with two
narrow products added in place (no further n × out or n × in tensor) or as one product with
``W + f B A``, whichever is cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratune.adapters.kernels.choose import dense_is_exact, dense_pays
from loratune.adapters.kernels.dropout import Dropout
from loratune.errors import ModelError


class Frozen(NamedTuple):
    """The base layer's parameters."""

    weight: Tensor
    bias: Tensor | None


class Factors(NamedTuple):
    """The correction ``factor · B A``, in the dtype of the products."""

    A: Tensor
    B: Tensor
    factor: float


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a fused layer, apart from its tensors."""

    scaling: float
    transposed: bool
    """The weight is stored (in, out), as GPT-2's Conv1D does."""
    dropout: Dropout | None
    dtype: torch.dtype
    """What the products compute in and the output has: the weight's, or autocast's."""
    records: bool
    """Whether a backward pass can follow."""

    @classmethod
    def begin(
        cls, x: Tensor, frozen: Frozen, scaling: float, transposed: bool, dropout_p: float
    ) -> Call:
        """Draw the dropout mask's seed and settle the dtype.

        Raises:
            ModelError: if the base layer trains, since it would get no gradient.
        """
        if any(p is not None and p.requires_grad for p in frozen):
            raise ModelError(
                "a fused adapter layer gives its base layer no gradient",
                fix="freeze the base layer, or set adapter.kernel=reference",
            )
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else frozen.weight.dtype
        return cls(scaling, transposed, Dropout.draw(dropout_p), dtype, torch.is_grad_enabled())

    @property
    def factor(self) -> float:
        """Scaling of the correction with dropout's 1/(1 - p) in it."""
        return self.scaling * (self.dropout.scale if self.dropout else 1.0)

    def rows(self, x: Tensor) -> Tensor:
        """(..., width) as (rows, width) in the computing dtype; a view wherever possible."""
        return x.reshape(-1, x.shape[-1]).to(self.dtype)

    def output(
        self, x: Tensor, frozen: Frozen, factors: Factors, keep_narrow: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The output y (n, out), and drop(x) Aᵀ (n, r) without 1/(1 - p) unless W + ΔW spared it."""
        n, (r, i), o = x.shape[0], factors.A.shape, factors.B.shape[0]
        if self._forms_sum(n * o if keep_narrow else n * (i + o), r, i, o):
            y = _base(x, self._summed(frozen.weight, factors), frozen.bias)
            return y, narrow(x, factors.A, None) if keep_narrow else None
        y = _base(x, self._in_out(frozen.weight), frozen.bias)
        h = narrow(x, factors.A, self.dropout)
        return y.addmm_(h, packed(factors.B.t()), alpha=factors.factor), h

    def input_gradient(
        self, g: Tensor, weight: Tensor, factors: Factors, narrow_gradient: Tensor | None
    ) -> Tensor:
        """∂x (n, in) from g (n, out), and from g B (n, r) if that is known already."""
        n, (r, i), o = g.shape[0], factors.A.shape, factors.B.shape[0]
        if self._forms_sum(n * (i + o) if narrow_gradient is None else n * i, r, i, o):
            return torch.mm(g, self._summed(weight, factors).t())
        t = torch.mm(g, factors.B) if narrow_gradient is None else narrow_gradient
        grad = torch.mm(g, self._in_out(weight).t())
        if self.dropout is None:
            return grad.addmm_(t, factors.A, alpha=factors.factor)
        for rows, keep in self.dropout.masks(grad):
            grad[rows].addcmul_(keep, t[rows] @ factors.A, value=factors.factor)
        return grad

    def _forms_sum(self, spared: int, r: int, i: int, o: int) -> bool:
        return self.dropout is None and dense_is_exact(self.dtype) and dense_pays(spared, r, i, o)

    def _in_out(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.dtype)
        return weight if self.transposed else weight.t()

    def _summed(self, weight: Tensor, factors: Factors) -> Tensor:
        """W + ΔW as (in, out), formed in the layout in which W is stored."""
        left, right = (factors.A.t(), factors.B.t()) if self.transposed else (factors.B, factors.A)
        return self._in_out(torch.addmm(weight.to(self.dtype), left, right, alpha=factors.factor))


def narrow(x: Tensor, factor: Tensor, dropout: Dropout | None) -> Tensor:
    """Compute drop(x) Aᵀ without dropout's 1/(1 - p): x (n, in), A (r, in) → (n, r)."""
    panel = packed(factor.t())
    if dropout is None:
        return torch.mm(x, panel)
    h = x.new_empty(x.shape[0], factor.shape[0])
    for rows, keep in dropout.masks(x):
        torch.mm(keep.mul_(x[rows]), panel, out=h[rows])
    return h


def packed(panel: Tensor) -> Tensor:
    """A narrow operand in the layout its product is fastest in.

    The CPU's matrix library runs these products up to twice as fast on a row-major operand, and
    copying rank × width numbers costs next to nothing.
    """
    return panel.contiguous() if panel.device.type == "cpu" else panel


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
