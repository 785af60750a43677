"""A layer with a gain for every output: its ΔW depends on W and has W's rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loratune.adapters.base import Adapter, LayerPlan, data_device
from loratune.adapters.config import AdapterConfig, LayerKind


class Gain(Adapter):
    """y + g · strength / ‖rows of W‖ ⊙ (y - bias)."""

    def __init__(self, plan: LayerPlan, config: AdapterConfig) -> None:
        super().__init__(plan, config)
        device = data_device(self.weight)
        self.gain = nn.Parameter(torch.zeros(plan.shape.out_features, device=device))

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        product = y if self.bias is None else y - self.bias
        return product.to(self.gain.dtype) * self._factors(self.weight)

    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        factors, block = self._factors(weight), weight[rows].to(self.gain.dtype)
        return block * (factors[rows, None] if self._is_linear else factors)

    @property
    def _is_linear(self) -> bool:
        return self.shape.kind is LayerKind.linear

    def _factors(self, weight: Tensor) -> Tensor:
        norms = weight.to(self.gain.dtype).norm(dim=1 if self._is_linear else 0)
        return self.scaling * self.gain / norms

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        return {"gain": self.gain * scale}

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"gain": self.gain}
