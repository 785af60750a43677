"""VeRA's layer (arXiv:2310.11454): two trained vectors around shared frozen matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import LayerPlan, data_device
from loratune.adapters.config import AdapterConfig, LayerKind
from loratune.adapters.kernels.shared_input import SharedProducts
from loratune.adapters.kernels.vera import fused_vera_linear
from loratune.adapters.low_rank import LowRank
from loratune.adapters.vera.config import VeRAConfig


class SharedProjection(nn.Module):
    """The frozen A (r, widest in) and B (widest out, r) that all VeRA layers of a model share.

    Both are drawn on the CPU in fp32 from one generator, A first, Kaiming-uniform with gain √2,
    bit-equal to PEFT's.  A layer takes the leading columns of A and rows of B; since the draw is
    row-major over the widest input, other targets give other matrices.

    Attributes:
        vera_A: (rank, in_features).
        vera_B: (out_features, rank).
        products: ``x Aᵀ`` of the layers that read the same input.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, rank: int, in_features: int, out_features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.register_buffer("vera_A", _kaiming(rank, in_features, generator))
        self.register_buffer("vera_B", _kaiming(out_features, rank, generator))
        self.products = SharedProducts()


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class VeRA(LowRank):
    """y = W x + λ_b ⊙ (B (λ_d ⊙ (A drop(x)))), with λ_d (r,) and λ_b (out,) trained.

    With ``alpha`` set the correction is scaled by alpha/rank; files fold that factor into λ_b.
    """

    def __init__(
        self, plan: LayerPlan, config: VeRAConfig, projection: SharedProjection | None = None
    ) -> None:
        super().__init__(plan, config)
        if projection is None:
            projection = _projection_for([plan], config)
        self.projection = projection
        device = data_device(self.stored_weight)
        self.vera_lambda_d = nn.Parameter(torch.full((plan.rank,), config.d_initial, device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(plan.shape.out_features, device=device))

    @classmethod
    def build(cls, plans: Sequence[LayerPlan], config: AdapterConfig) -> list[Self]:
        """One projection for all layers, wide enough for the widest."""
        assert isinstance(config, VeRAConfig)
        if not plans:
            return []
        projection = _projection_for(plans, config)
        return [cls(plan, config, projection) for plan in plans]

    @property
    def _sliced(self) -> tuple[Tensor, Tensor]:
        vera_A = self.projection.vera_A[:, : self.shape.in_features]
        return vera_A, self.projection.vera_B[: self.shape.out_features, :]

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        vera_A, vera_B = self._sliced
        x = self.dropout(x.to(self.vera_lambda_d.dtype))
        inner = self.vera_lambda_d * F.linear(x, vera_A)
        delta = self.vera_lambda_b * F.linear(inner, vera_B)
        return delta if self.scaling == 1 else delta * self.scaling

    def fused_forward(self, x: Tensor) -> Tensor | None:
        if not self._base_is_plain():
            return None
        vera_A, vera_B = self._sliced
        return fused_vera_linear(
            x,
            self.stored_weight,
            self.bias,
            vera_A,
            vera_B,
            self.vera_lambda_d,
            self.vera_lambda_b,
            self.scaling,
            self.config.dropout if self.training else 0.0,
            transposed=self.shape.kind is LayerKind.conv1d,
            products=self.projection.products,
            blocks=self.weight_blocks,
        )

    def factors(self) -> tuple[Tensor, Tensor, float]:
        vera_A, vera_B = self._sliced
        lambda_b = (self.vera_lambda_b * self.scaling).unsqueeze(-1)
        return self.vera_lambda_d.unsqueeze(-1) * vera_A, lambda_b * vera_B, 1.0

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """ΔW times ``scale``, in λ_b."""
        return {**self.adapter_tensors(), "vera_lambda_b": self.vera_lambda_b * scale}

    def peft_tensors(self) -> dict[str, Tensor]:
        """λ's as in PEFT's file, which knows no scaling: s is folded into λ_b, exactly."""
        return {**self.adapter_tensors(), "vera_lambda_b": self.vera_lambda_b * self.scaling}

    @torch.no_grad()
    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        unscaled = tensors["vera_lambda_b"] / self.scaling
        self.load_adapter_tensors({**tensors, "vera_lambda_b": unscaled})

    def shared_tensors(self) -> dict[str, Tensor]:
        return {
            "base_model.vera_A": self.projection.vera_A,
            "base_model.vera_B": self.projection.vera_B,
        }


def _projection_for(plans: Sequence[LayerPlan], config: VeRAConfig) -> SharedProjection:
    projection = SharedProjection(
        config.rank,
        max(plan.shape.in_features for plan in plans),
        max(plan.shape.out_features for plan in plans),
        config.projection_seed,
    )
    weight = plans[0].base_layer.weight
    assert isinstance(weight, Tensor)
    return projection.to(data_device(weight))
