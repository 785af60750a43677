"""A frozen linear layer with a LoRA correction as one autograd node.

``y = x Wᵀ + c + s · drop(x) Aᵀ Bᵀ`` (arXiv:2106.09685, eq. 3).  Beyond the frozen parameters the
backward pass keeps ``h = drop(x) Aᵀ`` (n, r), and ``x`` itself (not a copy) if A trains.  With
``g = ∂L/∂y`` and ``t = g B``: ``∂B = s gᵀh``, ``∂A = s tᵀ drop(x)``, ``∂x = g W + s drop'(t A)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.adapters.kernels.call import Call, add_widened, base_product, narrow


def fused_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    transposed: bool = False,
) -> Tensor:
    """A whole LoRA layer: the frozen product and its correction.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) if ``transposed``.
        bias: (out) or ``None``.
        lora_A: (rank, in); if it needs no gradient (LoRA-FA), ``x`` is not kept.
        lora_B: (out, rank).
        scaling: factor s on the correction.
        dropout_p: share of the correction's input dropped; give 0 outside training.
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does.

    Returns:
        (..., out) in the weight's dtype, or autocast's.  In half precision the factors are cast
        down (never x up) and the factors' gradients are returned in the factors' own dtype.
    """
    call = Call.begin(x, weight, scaling, transposed, dropout_p)
    with torch.autocast(x.device.type, enabled=False):
        y = _LoRALinear.apply(x, weight, bias, lora_A, lora_B, call)
    assert isinstance(y, Tensor)
    return y


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        call: Call,
    ) -> Tensor:
        rows, A, B = call.rows(x), lora_A.to(call.dtype), lora_B.to(call.dtype)
        y = base_product(rows, call.forward_weight(weight), bias)
        h = narrow(rows, A, call.dropout)
        y.addmm_(h, B.t(), alpha=call.factor)
        ctx.call = call
        ctx.input = (x.shape, x.dtype)
        trains_A, trains_B = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        ctx.save_for_backward(
            x if trains_A else None, weight, h if trains_B else None, lora_A, lora_B
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, weight, h, lora_A, lora_B = ctx.saved_tensors
        trains_x, _, _, trains_A, trains_B, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            g = call.rows(grad)
            A, B = lora_A.to(call.dtype), lora_B.to(call.dtype)
            grad_x = grad_A = grad_B = None
            if trains_B:
                grad_B = torch.mm(g.t(), h).to(lora_B.dtype).mul_(call.factor)
            t = torch.mm(g, B) if trains_A or trains_x else None
            if trains_A:
                grad_A = _masked_product(t, call.rows(x), call).to(lora_A.dtype).mul_(call.factor)
            if trains_x:
                grad_x = torch.mm(g, call.forward_weight(weight).t())
                add_widened(grad_x, t, A, call.factor, call.dropout)
                shape, dtype = ctx.input
                grad_x = grad_x.to(dtype).view(shape)
        return grad_x, None, None, grad_A, grad_B, None


def _masked_product(t: Tensor, x: Tensor, call: Call) -> Tensor:
    """tᵀ drop(x): (n, r), (n, in) → (r, in)."""
    if call.dropout is None:
        return torch.mm(t.t(), x)
    product = t.new_zeros(t.shape[1], x.shape[1])
    for rows, keep in call.dropout.masks(x):
        product.addmm_(t[rows].t(), keep.mul_(x[rows]))
    return product
