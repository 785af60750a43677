"""IA3's layer (arXiv:2205.05638): outputs, or inputs, times trained factors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import Adapter, LayerPlan, data_device
from loratune.adapters.config import LayerKind
from loratune.adapters.ia3.config import IA3Config


class IA3(Adapter):
    """y = l ⊙ (W x + bias), or W (l ⊙ x) + bias in a feedforward block's last layer; l from 1.

    As in PEFT the outputs' factors reach the bias too, which a merge therefore changes as well.
    """

    def __init__(self, plan: LayerPlan, config: IA3Config) -> None:
        super().__init__(plan, config)
        self.scales_inputs = config.scales_inputs(plan.shape)
        shape = (1, plan.shape.in_features) if self.scales_inputs else (plan.shape.out_features, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape, device=data_device(self.stored_weight)))

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        change = self.ia3_l.flatten() - 1
        if not self.scales_inputs:
            return y * change
        weight = self.weight if self.shape.kind is LayerKind.linear else self.weight.T
        return F.linear(x.to(change.dtype) * change, weight.to(change.dtype))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        factors = self.ia3_l.flatten()
        return self._base((x * factors).to(x.dtype)) if self.scales_inputs else y * factors

    def fused_forward(self, x: Tensor) -> Tensor:
        """The same without a product that is not used; autograd keeps what is multiplied."""
        y = x if self.scales_inputs else self._base(x)
        return self.output(x, y).to(y.dtype)

    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        change, block = self.ia3_l.flatten() - 1, weight[rows].to(self.ia3_l.dtype)
        by_row = self.scales_inputs != (self.shape.kind is LayerKind.linear)
        return block * (change[rows, None] if by_row else change)

    @property
    def corrects_bias(self) -> bool:
        return self.bias is not None and not self.scales_inputs

    def delta_bias(self, bias: Tensor) -> Tensor:
        return (self.ia3_l.flatten() - 1) * bias.to(self.ia3_l)

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """ΔW times ``scale``: the factors' way from 1."""
        return {"ia3_l": torch.lerp(torch.ones_like(self.ia3_l), self.ia3_l, scale)}

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.ia3_l}
