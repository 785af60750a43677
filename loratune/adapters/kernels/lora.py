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

from loratune.adapters.kernels.blocks import Blocks
from loratune.adapters.kernels.linear import Call, Factors, Frozen, packed


def fused_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    transposed: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """A whole LoRA layer: the frozen product and its correction.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) if ``transposed``; as it is stored if it is quantized.
        bias: (out) or ``None``.
        lora_A: (rank, in); if it needs no gradient (LoRA-FA), ``x`` is not kept.
        lora_B: (out, rank).
        scaling: factor s on the correction.
        dropout_p: share of the correction's input dropped; give 0 outside training.
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does.
        blocks: how a quantized weight is widened.

    Returns:
        (..., out) in the weight's dtype, or autocast's.  In half precision the factors are cast
        down (never x up) and the factors' gradients are returned in the factors' own dtype.
    """
    call = Call.begin(x, Frozen(weight, bias, blocks), scaling, transposed, dropout_p)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _LoRALinear.apply(x, weight, bias, lora_A, lora_B, call)  # type: ignore[no-untyped-call]
    # Outside the node: autograd lets nobody change a view in place that was made inside one.
    return y.view(*x.shape[:-1], y.shape[-1])


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
        _, _, _, trains_A, trains_B, _ = ctx.needs_input_grad
        factors = _factors(lora_A, lora_B, call)
        keeps_h = trains_B and call.records
        y, h = call.output(call.rows(x), Frozen(weight, bias), factors, keeps_h)
        ctx.call = call
        ctx.input = (x.shape, x.dtype)
        ctx.save_for_backward(
            x if trains_A else None, weight, h if keeps_h else None, lora_A, lora_B
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, weight, h, lora_A, lora_B = ctx.saved_tensors
        trains_x, _, _, trains_A, trains_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        with torch.autocast(grad.device.type, enabled=False):
            g, factors = call.rows(grad), _factors(lora_A, lora_B, call)
            if trains_B:
                # (hᵀg)ᵀ, not gᵀh: the narrow operand on the left is faster.
                grad_B = torch.mm(packed(h.t()), g).t().to(lora_B.dtype).mul_(call.factor)
            rows = call.rows(x) if trains_A else None
            grad_x, grad_A = call.input_gradients(g, weight, factors, trains_x, rows)
        shape, dtype = ctx.input
        grad_x = None if grad_x is None else grad_x.to(dtype).view(shape)
        grad_A = None if grad_A is None else grad_A.to(lora_A.dtype)
        return grad_x, None, None, grad_A, grad_B, None


def _factors(lora_A: Tensor, lora_B: Tensor, call: Call) -> Factors:
    """A, and B with the scaling and dropout's 1/(1 - p) in it."""
    B = lora_B if call.factor == 1.0 else lora_B * call.factor
    return Factors(lora_A.to(call.dtype), B.to(call.dtype))
