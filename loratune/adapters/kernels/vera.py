"""A frozen linear layer with a VeRA correction as one autograd node.

``y = x Wᵀ + c + s · λ_b ⊙ (B (λ_d ⊙ (A drop(x))))`` (arXiv:2310.11454, eq. 2).  Beyond the frozen
parameters the backward pass keeps only ``u = drop(x) Aᵀ`` (n, r).  With ``g = ∂L/∂y`` and
``P = s · B ⊙ (gᵀu)`` (out, r), both gradients are sums of P: ``∂λ_b = P λ_d``, ``∂λ_d = Pᵀ λ_b``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.adapters.kernels.blocks import Blocks
from loratune.adapters.kernels.linear import Call, Factors, Frozen
from loratune.adapters.kernels.shared_input import SharedProducts


def fused_vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vera_A: Tensor,
    vera_B: Tensor,
    lambda_d: Tensor,
    lambda_b: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    transposed: bool = False,
    products: SharedProducts | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """A whole VeRA layer: the frozen product and its correction.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) if ``transposed``; as it is stored if it is quantized.
        bias: (out) or ``None``.
        vera_A: (rank, in), frozen; a slice of the shared matrix will do.
        vera_B: (out, rank), frozen; likewise.
        lambda_d: (rank).
        lambda_b: (out).
        scaling: factor s on the correction.
        dropout_p: share of the correction's input dropped; give 0 outside training.
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does.
        products: where layers with the same frozen A share ``x Aᵀ``.
        blocks: how a quantized weight is widened.

    Returns:
        (..., out) in the weight's dtype, or autocast's.
    """
    call = Call.begin(x, Frozen(weight, bias, blocks), scaling, transposed, dropout_p)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _VeRALinear.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, vera_A, vera_B, lambda_d, lambda_b, call, products
        )
    # Outside the node: autograd lets nobody change a view in place that was made inside one.
    return y.view(*x.shape[:-1], y.shape[-1])


class _VeRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        vera_A: Tensor,
        vera_B: Tensor,
        lambda_d: Tensor,
        lambda_b: Tensor,
        call: Call,
        products: SharedProducts | None,
    ) -> Tensor:
        factors = _factors(vera_A, vera_B, lambda_d, lambda_b, call)
        keeps_u = call.records and (ctx.needs_input_grad[5] or ctx.needs_input_grad[6])
        if products is None or call.dropout is not None:
            y, u = call.output(call.rows(x), Frozen(weight, bias), factors, keeps_u)
        else:
            shared = products.recall(x, vera_A, call.dtype)
            y, u = call.output(call.rows(x), Frozen(weight, bias), factors, keeps_u, shared)
            if u is not None and u is not shared:
                products.remember(x, vera_A, call.dtype, u)
        ctx.call = call
        ctx.input = (x.shape, x.dtype)
        ctx.save_for_backward(weight, u if keeps_u else None, vera_A, vera_B, lambda_d, lambda_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        weight, u, vera_A, vera_B, lambda_d, lambda_b = ctx.saved_tensors
        grad_d = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            g = call.rows(grad)
            if u is not None:
                P = torch.mm(g.t(), u).to(lambda_b.dtype).mul_(vera_B)
                grad_d = torch.mv(P.t(), lambda_b).mul_(call.factor)
                grad_b = torch.mv(P, lambda_d).mul_(call.factor)
            factors = _factors(vera_A, vera_B, lambda_d, lambda_b, call)
            grad_x, _ = call.input_gradients(g, weight, factors, ctx.needs_input_grad[0], None)
        shape, dtype = ctx.input
        grad_x = None if grad_x is None else grad_x.to(dtype).view(shape)
        return grad_x, None, None, None, None, grad_d, grad_b, None, None


def _factors(
    vera_A: Tensor, vera_B: Tensor, lambda_d: Tensor, lambda_b: Tensor, call: Call
) -> Factors:
    """A, and s Λ_b B Λ_d with dropout's 1/(1 - p) in it."""
    widening = (vera_B * (call.factor * lambda_b)[:, None]).mul_(lambda_d)
    return Factors(vera_A.to(call.dtype), widening.to(call.dtype))
