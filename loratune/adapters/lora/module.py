"""LoRA's layer (arXiv:2106.09685)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import LayerPlan
from loratune.adapters.config import LayerKind
from loratune.adapters.kernels.lora import fused_lora_linear
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.lora.initialization import initial_parameters
from loratune.adapters.low_rank import LowRank


class LoRA(LowRank):
    """y = W x + s·B A drop(x), with A (r, in) and B (out, r).

    The order of operations is PEFT's, so that the reference kernel is bit-equal to it in fp32 on
    a CPU.  For an embedding A is (r, vocabulary) and B (width, r): y = E[ids] + s·A[:, ids]ᵀ Bᵀ.
    """

    def __init__(self, plan: LayerPlan, config: LoRAConfig) -> None:
        super().__init__(plan, config)
        self.lora_A, self.lora_B = initial_parameters(plan, config.init)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        if self.shape.kind is LayerKind.embedding:
            return embedding_product(self.base_layer, x, self.lora_A, self.lora_B, self.scaling)
        x = self.dropout(x.to(self.lora_A.dtype))
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

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

    def adapter_tensors(self) -> dict[str, Tensor]:
        if self.shape.kind is LayerKind.embedding:
            return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


def embedding_product(
    base: nn.Module, ids: Tensor, lora_A: Tensor, lora_B: Tensor, *factors: Tensor | float
) -> Tensor:
    """A[:, ids]ᵀ Bᵀ, looked up as the embedding ``base`` looks up its own rows.

    Args:
        base: the embedding.
        ids: (...).
        lora_A: (rank, vocabulary).
        lora_B: (width, rank).
        factors: what the result is multiplied by, in this order.

    Returns:
        (..., width).
    """
    assert isinstance(base, nn.Embedding)
    after_A = F.embedding(
        ids, lora_A.T, base.padding_idx, base.max_norm, base.norm_type,
        base.scale_grad_by_freq, base.sparse,
    )  # fmt: skip
    product = after_A @ lora_B.T
    for factor in factors:
        product = factor * product
    # Some models multiply by a constant inside their embedding (Gemma): so must we.
    embed_scale = getattr(base, "embed_scale", None)
    return product if embed_scale is None else product * embed_scale.to(product.dtype)
