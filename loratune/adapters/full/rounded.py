"""A linear layer whose weight is kept in fp32 and rounded to the input's format for the product.

Autograd would keep the rounded weight of every layer until the backward pass, half as many bytes
again as the weights have; here it is rounded a second time there.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    """X Wᵀ + b with W and b rounded to x's dtype; gradients reach the unrounded ones in theirs.

    Args:
        x: (..., in), in half precision.
        weight: (out, in), or (in, out) where ``transposed``.
        bias: (out,), or ``None``.
        transposed: how the weight is stored.
    """
    y: Tensor = _RoundedLinear.apply(x, weight, bias, transposed)  # type: ignore[no-untyped-call]
    return y


class _RoundedLinear(Function):
    """Keeps x and the fp32 weight, which is kept anyway."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed  # type: ignore[attr-defined]
        ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]
        rounded = weight.to(x.dtype)
        return F.linear(
            x, rounded.T if transposed else rounded, None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            rounded = weight.to(gradient.dtype)
            for_x = gradient @ (rounded.T if ctx.transposed else rounded)
        if ctx.needs_input_grad[1]:
            product = inputs.T @ rows if ctx.transposed else rows.T @ inputs
            for_weight = product.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0, dtype=ctx.bias_dtype)
        return for_x, for_weight, for_bias, None
