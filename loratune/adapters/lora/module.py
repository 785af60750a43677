"""LoRA's layer (arXiv:2106.09685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import LayerPlan, data_device
from loratune.adapters.config import LayerKind
from loratune.adapters.kernels.lora import fused_lora_linear
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.lora.initialization import (
    initial_embedding_factors,
    initial_expert_factors,
    initial_factors,
)
from loratune.adapters.low_rank import LowRank


class LoRA(LowRank):
    """y = W x + s·B A drop(x), with A (r, in) and B (out, r).

    The order of operations is PEFT's, so that the reference kernel is bit-equal to it in fp32 on
    a CPU.  For an embedding A is (r, vocabulary) and B (width, r): y = E[ids] + s·A[:, ids]ᵀ Bᵀ.
    For stacked experts both hold every expert's, as in PEFT's file: A (experts · r, in) expert by
    expert, B (out, r · experts) with the experts of a column side by side.
    """

    def __init__(self, plan: LayerPlan, config: LoRAConfig) -> None:
        super().__init__(plan, config)
        weight = self.weight
        if plan.shape.kind is LayerKind.embedding:
            vocabulary, width = weight.shape
            factors = initial_embedding_factors((vocabulary, width), plan.rank, config.init)
        elif plan.shape.is_stacked:
            sizes = plan.shape.experts, plan.shape.out_features, plan.shape.in_features
            factors = initial_expert_factors(sizes, plan.rank, config.init)
        else:
            oriented = weight if plan.shape.kind is LayerKind.linear else weight.T
            factors = initial_factors(oriented, plan.rank, config.init, plan.shape.name)
        lora_A, lora_B = (factor.to(data_device(weight)) for factor in factors)
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        if self.shape.kind is LayerKind.embedding:
            return self._embedding_delta(x)
        if self.shape.is_stacked:
            A, B, scale = self.stacked_factors()
            return torch.bmm(torch.bmm(x.to(A.dtype), A.transpose(1, 2)), B.transpose(1, 2)) * scale
        x = self.dropout(x.to(self.lora_A.dtype))
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    def _embedding_delta(self, ids: Tensor) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        after_A = F.embedding(
            ids, self.lora_A.T, base.padding_idx, base.max_norm, base.norm_type,
            base.scale_grad_by_freq, base.sparse,
        )  # fmt: skip
        delta = (after_A @ self.lora_B.T) * self.scaling
        # Some models multiply by a constant inside their embedding (Gemma): so must we.
        embed_scale = getattr(base, "embed_scale", None)
        return delta if embed_scale is None else delta * embed_scale.to(delta.dtype)

    def fused_forward(self, x: Tensor) -> Tensor | None:
        if self.shape.kind is LayerKind.embedding or not self._base_is_plain():
            return None
        return fused_lora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.scaling,
            self.config.dropout if self.training else 0.0,
            transposed=self.shape.kind is LayerKind.conv1d,
        )

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A, self.lora_B, self.scaling

    def stacked_factors(self) -> tuple[Tensor, Tensor, float]:
        experts, out = self.shape.experts, self.shape.out_features
        A = self.lora_A.view(experts, self.rank, -1)
        B = self.lora_B.view(out, self.rank, experts).permute(2, 0, 1)
        return A, B, self.scaling

    def adapter_tensors(self) -> dict[str, Tensor]:
        if self.shape.kind is LayerKind.embedding:
            return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
