"""A layer whose own weight trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from loratune.adapters.base import Adapter, LayerPlan, scaled_as
from loratune.adapters.config import LayerKind
from loratune.adapters.full.config import FullConfig
from loratune.adapters.full.rounded import rounded_linear
from loratune.errors import ModelError


class Full(Adapter):
    """y = W' x (+ b'), with W' trained in place of W.

    W' is kept in fp32 and rounded to the base's number format where it is used: an update far
    below the spacing of bf16 numbers is not lost, and the merged model, which is rounded alike,
    computes what training computed.  The adapter file holds W' itself: W + (W' − W) is not W' to
    the bit.  Dropout acts on the layer's input, except on token ids.

    Attributes:
        trained: the fp32 ``weight``, and ``bias`` where every parameter trains.
    """

    def __init__(self, plan: LayerPlan, config: FullConfig) -> None:
        super().__init__(plan, config)
        names = ["weight"]
        if config.every_parameter and self.bias is not None:
            names.append("bias")
        self.trained = nn.ParameterDict(
            {name: plan.trained_copy(self.base_layer.get_parameter(name)) for name in names}
        )

    @classmethod
    def build(cls, plans: Sequence[LayerPlan], config: Any) -> list[Self]:
        """Layers that share a weight in the base share the trained one: tied weights stay tied."""
        adapters = [cls(plan, config) for plan in plans]
        first: dict[int, Self] = {}
        for adapter in adapters:
            owner = first.setdefault(id(adapter.weight), adapter)
            adapter.trained["weight"] = owner.trained["weight"]
        return adapters

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            return super().forward(x)
        if self.shape.kind is not LayerKind.embedding:
            x = self.dropout(x)
        dtype, is_plain = self.weight.dtype, self._base_is_plain()
        if is_plain and dtype is not self.trained["weight"].dtype:
            return rounded_linear(
                x,
                self.trained["weight"],
                self.trained.get("bias", self.bias),
                transposed=self.shape.kind is LayerKind.conv1d,
            )
        parameters = {name: value.to(dtype) for name, value in self.trained.items()}
        y: Tensor = functional_call(self.base_layer, parameters, (x,))
        return y

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        """X (W' − W)ᵀ; a trained bias is not a part of it."""
        weight = self.trained["weight"]
        difference = weight - self.weight.to(weight.dtype)
        if self.shape.kind is LayerKind.embedding:
            return scaled_as(self.base_layer, F.embedding(x, difference))
        is_linear = self.shape.kind is LayerKind.linear
        return F.linear(x.to(weight.dtype), difference if is_linear else difference.T)

    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        trained: Tensor = self.trained["weight"]
        return trained[rows] - weight[rows].to(trained)

    def trained_parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.trained.items()}

    def merged_weight(self) -> Tensor:
        return self.merged_parameters()["weight"]

    @torch.no_grad()
    def merged_parameters(self) -> dict[str, Tensor]:
        merged = {
            name: value.to(self.weight.dtype, copy=True) for name, value in self.trained.items()
        }
        if not all(bool(value.isfinite().all()) for value in merged.values()):
            raise ModelError("merging gives NaN or infinite weights", where=self.shape.name)
        return merged

    @torch.no_grad()
    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """W + scale · (W' − W), and the bias likewise."""
        return {
            f"trained_{name}": torch.lerp(
                self.base_layer.get_parameter(name).to(value), value, scale
            )
            for name, value in self.trained.items()
        }

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {f"trained_{name}": value for name, value in self.trained.items()}
