"""Products with a frozen weight that is stored in 4 or 8 bits and widened some rows at a time.

The whole weight is never in memory in a wide number format, and nothing wide is kept for the
backward pass: each pass widens the blocks again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Blocks = Callable[[torch.dtype], Iterator[tuple[slice, Tensor]]]
"""Gives rows (outputs) of a weight (out, in) in a number format, each with its place."""


def blocks_of(layer: nn.Module) -> Blocks | None:
    """How the layer's weight is widened, where it is quantized; ``None`` where it is plain."""
    weight = getattr(layer, "weight", None)
    is_wide = isinstance(weight, Tensor) and weight.is_floating_point()
    return None if is_wide else cast("Blocks | None", getattr(layer, "weight_blocks", None))


def weight_of(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """A layer's weight as a matrix of numbers: widened, to its own format, if it is quantized."""
    blocks, weight = blocks_of(layer), layer.weight
    assert isinstance(weight, Tensor)
    if blocks is None:
        return weight
    wide = dtype or cast(torch.dtype, layer.wide_dtype)
    parts = [block for _, block in blocks(wide)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_product(y: Tensor, x: Tensor, blocks: Blocks) -> Tensor:
    """Add x (n, in) Wᵀ to y (n, out), in y's number format."""
    for rows, block in blocks(y.dtype):
        y[:, rows].addmm_(x, block.t())
    return y


def add_input_gradient(grad_x: Tensor, g: Tensor, blocks: Blocks) -> Tensor:
    """Add g (n, out) W to ∂x (n, in), in its number format."""
    for rows, block in blocks(grad_x.dtype):
        grad_x.addmm_(g[:, rows], block)
    return grad_x


def frozen_linear(x: Tensor, blocks: Blocks, bias: Tensor | None, out_features: int) -> Tensor:
    """``x Wᵀ + bias`` with W quantized and frozen; autograd keeps nothing of x or W.

    Args:
        x: (..., in).
        blocks: of the weight.
        bias: (out) or ``None``.
        out_features: width of the result.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        y: Tensor = _FrozenLinear.apply(x, blocks, bias, out_features)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], out_features)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, blocks: Blocks, bias: Tensor | None, out_features: int
    ) -> Tensor:
        ctx.blocks, ctx.shape, ctx.dtype = blocks, x.shape, x.dtype
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_zeros(len(rows), out_features)
        if bias is not None:
            y += bias.to(y.dtype)
        return add_product(y, rows, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = g.new_zeros(len(g), ctx.shape[-1])
        return add_input_gradient(grad_x, g, ctx.blocks).view(ctx.shape), None, None, None
