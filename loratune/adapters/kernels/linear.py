"""What the fused layers share: the products of a frozen weight with a correction beside it.

With ``W`` (out, in) frozen, ``A`` (r, in) and ``B`` (out, r), and t = g B for g = ∂L/∂y:
``y = x Wᵀ + c + drop(x) Aᵀ Bᵀ``, ``∂x = g W + drop'(t A)``, ``∂A = tᵀ drop(x)``.  The narrow
product comes first and the wide one is added to it in place, so that there is no further tensor
of y's or x's size and no further pass over it; or both become one product with ``W + B A``,
where that is cheaper.

RunLoRA (arXiv:2312.03415) chooses among such orders by counting multiplications.  Forming W + ΔW
also reads and writes a whole weight, which at small rank costs more than its multiplications; in
timings on one CPU core (in, out 768 and 3,072; rank 16, 64, 256) that came to those of 32 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratune.adapters.kernels.blocks import Blocks, add_input_gradient, add_product
from loratune.adapters.kernels.dropout import Dropout
from loratune.errors import ModelError

WORTH_PACKING = 64
"""Widest operand that is copied to be row-major."""
FORMING_OVERHEAD_RANKS = 32


class Frozen(NamedTuple):
    """The base layer's parameters, and how its weight is widened where it is quantized."""

    weight: Tensor
    bias: Tensor | None
    blocks: Blocks | None = None


class Factors(NamedTuple):
    """The correction ``B A`` in the dtype of the products; every constant factor is in B."""

    A: Tensor
    B: Tensor


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
    blocks: Blocks | None = None
    """How the weight is widened, where it is quantized."""

    @classmethod
    def begin(
        cls, x: Tensor, frozen: Frozen, scaling: float, transposed: bool, dropout_p: float
    ) -> Call:
        """Draw the dropout mask's seed and settle the dtype.

        Raises:
            ModelError: if the base layer trains, since it would get no gradient.
        """
        if any(p is not None and p.requires_grad for p in (frozen.weight, frozen.bias)):
            raise ModelError(
                "a fused adapter layer gives its base layer no gradient",
                fix="freeze the base layer, or set adapter.kernel=reference",
            )
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        own = x.dtype if frozen.blocks else frozen.weight.dtype
        dtype = torch.get_autocast_dtype(device) if autocast else own
        dropout, records = Dropout.draw(dropout_p), torch.is_grad_enabled()
        return cls(scaling, transposed, dropout, dtype, records, frozen.blocks)

    @property
    def factor(self) -> float:
        """Scaling of the correction with dropout's 1/(1 - p) in it."""
        return self.scaling * (self.dropout.scale if self.dropout else 1.0)

    def rows(self, x: Tensor) -> Tensor:
        """(..., width) as (rows, width) in the computing dtype; a view wherever possible."""
        return x.reshape(-1, x.shape[-1]).to(self.dtype)

    def output(
        self,
        x: Tensor,
        frozen: Frozen,
        factors: Factors,
        keep_narrow: bool,
        shared_narrow: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output y (n, out), and drop(x) Aᵀ (n, r) without 1/(1 - p) if it is to be kept."""
        n, (r, i), o = x.shape[0], factors.A.shape, factors.B.shape[0]
        needs_narrow = keep_narrow and shared_narrow is None
        h = shared_narrow
        if self._forms_sum(n * o if keep_narrow else n * (i + o), r, i, o):
            y = _affine(x, self._summed(frozen.weight, factors), frozen.bias)
            return y, self._narrow(x, factors.A) if needs_narrow else h
        h = self._narrow(x, factors.A) if h is None else h
        y = _affine(h, packed(factors.B.t()), frozen.bias)
        if self.blocks is not None:
            add_product(y, x, self.blocks)
        else:
            y.addmm_(x, self._in_out(frozen.weight))
        return y, h if keep_narrow else None

    def input_gradients(
        self, g: Tensor, weight: Tensor, factors: Factors, needs_x: bool, x: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """∂x (n, in) if it is needed, and ∂A (r, in) if ``x`` is given, from g (n, out)."""
        n, (r, i), o = g.shape[0], factors.A.shape, factors.B.shape[0]
        forms_sum = needs_x and self._forms_sum(n * i if x is not None else n * (i + o), r, i, o)
        grad_x = torch.mm(g, self._summed(weight, factors).t()) if forms_sum else None
        if x is None and (forms_sum or not needs_x):
            return grad_x, None
        t = torch.mm(g, factors.B)
        if self.dropout is not None:
            grad_x, grad_A = _masked_gradients(t, factors.A, self.dropout, needs_x, x)
        else:
            grad_A = None if x is None else torch.mm(packed(t.t()), x)
            if needs_x and grad_x is None:
                grad_x = torch.mm(t, factors.A)
        if grad_x is not None and not forms_sum:
            if self.blocks is not None:
                add_input_gradient(grad_x, g, self.blocks)
            else:
                grad_x.addmm_(g, self._in_out(weight).t())
        return grad_x, grad_A

    def _forms_sum(self, spared: int, r: int, i: int, o: int) -> bool:
        # In half precision most of a small ΔW would be rounded away in W + ΔW.
        is_exact = self.dtype in (torch.float32, torch.float64) and self.blocks is None
        return self.dropout is None and is_exact and dense_pays(spared, r, i, o)

    def _narrow(self, x: Tensor, A: Tensor) -> Tensor:
        panel = packed(A.t())
        if self.dropout is None:
            return torch.mm(x, panel)
        h = x.new_empty(x.shape[0], panel.shape[1])
        for rows, keep in self.dropout.masks(x):
            torch.mm(keep.mul_(x[rows]), panel, out=h[rows])
        return h

    def _in_out(self, weight: Tensor) -> Tensor:
        weight = weight.to(self.dtype)
        return weight if self.transposed else weight.t()

    def _summed(self, weight: Tensor, factors: Factors) -> Tensor:
        """W + ΔW as (in, out), formed in the layout in which W is stored."""
        left, right = (factors.A.t(), factors.B.t()) if self.transposed else (factors.B, factors.A)
        return self._in_out(torch.addmm(weight.to(self.dtype), left, right))


def _masked_gradients(
    t: Tensor, A: Tensor, dropout: Dropout, needs_x: bool, x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """drop'(t A) and tᵀ drop(x), both without 1/(1 - p), drawing the masks once."""
    like = t.new_empty(t.shape[0], A.shape[1]) if x is None else x
    grad_x = torch.empty_like(like) if needs_x else None
    grad_A = None if x is None else torch.zeros_like(A)
    for rows, keep in dropout.masks(like):
        if grad_x is not None:
            torch.mm(t[rows], A, out=grad_x[rows]).mul_(keep)
        if grad_A is not None and x is not None:
            grad_A.addmm_(packed(t[rows].t()), keep.mul_(x[rows]))
    return grad_x, grad_A


def dense_pays(spared: int, rank: int, in_features: int, out_features: int) -> bool:
    """Whether forming W + ΔW costs less than the narrow products that it spares.

    Args:
        spared: multiply-adds of the spared products, divided by the rank.
        rank: width of the narrow factors.
        in_features: input width of the layer.
        out_features: output width of the layer.
    """
    return spared * rank > in_features * out_features * (rank + FORMING_OVERHEAD_RANKS)


def packed(panel: Tensor) -> Tensor:
    """A narrow operand in the layout its product is fastest in.

    The CPU's matrix library runs these products up to twice as fast on a row-major operand, and
    copying a really narrow one costs next to nothing.
    """
    pays = panel.device.type == "cpu" and min(panel.shape) <= WORTH_PACKING
    return panel.contiguous() if pays else panel


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
