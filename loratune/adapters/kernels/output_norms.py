"""Lengths of the outputs' weights in W + ΔW, which is never held whole.

Output o of a layer has the weights V_o = W_o + s·(B A)_o; DoRA divides by ‖V_o‖ in every step.
Blocks of V are formed in fp32 and forgotten: the squares are sums of the numbers themselves, where
‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖² would lose digits to cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BLOCK = 1 << 16
"""Elements of V alive at one time on a CPU: a block stays in the cache."""
DEVICE_BLOCK = 1 << 24
"""The same on an accelerator, where a block should be worth a launch."""
FEWEST_COLUMNS = 64
"""Columns of a weight that are read together: single ones waste most of what memory delivers."""


def output_norms(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, *, input_first: bool
) -> Tensor:
    """‖V_o‖ for every output, (out,), differentiable by A and B.

    Args:
        weight: W as stored: (out, in), or (in, out) if ``input_first``; frozen.
        lora_A: (rank, in).
        lora_B: (out, rank).
        scaling: factor s on B A.
        input_first: the weight is a Conv1D's or an embedding's.
    """
    with torch.autocast(weight.device.type, enabled=False):
        norms: Tensor = _OutputNorms.apply(  # type: ignore[no-untyped-call]
            weight, lora_A, lora_B, scaling, input_first
        )
    return norms


class _OutputNorms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, input_first: bool
    ) -> Tensor:
        norms = lora_B.new_empty(len(lora_B))
        for outputs, block in _blocks(weight, lora_A, lora_B, scaling, input_first):
            norms[outputs] = torch.linalg.vector_norm(block, dim=0 if input_first else 1)
        ctx.save_for_backward(weight, lora_A, lora_B, norms)
        ctx.settings = (scaling, input_first)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With c = ∂L/∂‖V_o‖ / ‖V_o‖: ∂B = s·diag(c) V Aᵀ and ∂A = s·Bᵀ diag(c) V."""
        weight, lora_A, lora_B, norms = ctx.saved_tensors
        scaling, input_first = ctx.settings
        grad_A, grad_B = torch.zeros_like(lora_A), torch.empty_like(lora_B)
        factors = torch.where(norms > 0, scaling * grad / norms, 0.0)[:, None]
        with torch.autocast(weight.device.type, enabled=False):
            for outputs, block in _blocks(weight, lora_A, lora_B, scaling, input_first):
                by_output = block.t() if input_first else block
                grad_B[outputs] = (by_output @ lora_A.t()).mul_(factors[outputs])
                grad_A.addmm_((lora_B[outputs] * factors[outputs]).t(), by_output)
        return None, grad_A, grad_B, None, None


def _blocks(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, input_first: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Some outputs of V at a time, in the weight's layout and the factors' dtype."""
    count, width = len(lora_B), lora_A.shape[1]
    elements = CPU_BLOCK if lora_A.device.type == "cpu" else DEVICE_BLOCK
    step = max(FEWEST_COLUMNS if input_first else 1, elements // max(1, width))
    for start in range(0, count, step):
        outputs = slice(start, min(start + step, count))
        part = (weight[:, outputs] if input_first else weight[outputs]).to(lora_A)
        left, right = lora_B[outputs], lora_A
        if input_first:
            left, right = right.t(), left.t()
        yield outputs, torch.addmm(part, left, right, alpha=scaling)
