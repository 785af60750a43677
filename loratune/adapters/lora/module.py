"""LoRA's layer (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import LayerPlan, scaled_as
from loratune.adapters.config import LayerKind
from loratune.adapters.kernels.lora import fused_lora_linear
from loratune.adapters.lora.config import LoRAConfig
from loratune.adapters.lora.initialization import initial_parameters
from loratune.adapters.low_rank import LowRank


class LoRA(LowRank):
    """y = W x + s·B A drop(x), with A (r, in) and B (out, r).

    The order of operations is PEFT's, so that the reference kernel is bit-equal to it in fp32 on
    a CPU.  With a subtracted start B A − B₀A₀ takes the place of B A.  For an embedding A is
    (r, vocabulary) and B (width, r): y = E[ids] + s·A[:, ids]ᵀ Bᵀ.
    For stacked experts both hold every expert's, as in PEFT's file: A (experts · r, in) expert by
    expert, B (out, r · experts) with the experts of a column side by side.
    """

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, plan: LayerPlan, config: LoRAConfig) -> None:
        super().__init__(plan, config)
        self.lora_A, self.lora_B = initial_parameters(plan, config.init, self.scaling)
        is_subtracted = config.init.is_subtracted
        for name, factor in (("start_A", self.lora_A), ("start_B", self.lora_B)):
            self.register_buffer(name, factor.detach().clone() if is_subtracted else None)

    def _pair(self) -> tuple[Tensor, Tensor]:
        """A and B, or two factors of B A − B₀A₀ = (B − B₀)A + B₀(A − A₀).

        The differences are taken in fp32: nothing large cancels later, and half precision does not
        round away what was learnt.
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return (
            torch.cat([self.lora_A, self.lora_A - self.start_A]),
            torch.cat([self.lora_B - self.start_B, self.start_B], dim=1),
        )

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        if self.shape.kind is LayerKind.embedding:
            return embedding_product(self.base_layer, x, self.lora_A, self.lora_B, self.scaling)
        if self.shape.is_stacked:
            A, B, scale = self.stacked_factors()
            return torch.bmm(torch.bmm(x.to(A.dtype), A.transpose(1, 2)), B.transpose(1, 2)) * scale
        x, (A, B) = self.dropout(x.to(self.lora_A.dtype)), self._pair()
        return F.linear(F.linear(x, A), B) * self.scaling

    def fused_forward(self, x: Tensor) -> Tensor | None:
        if self.shape.kind is LayerKind.embedding or not self._base_is_plain():
            return None
        return fused_lora_linear(
            x,
            self.stored_weight,
            self.bias,
            *self._pair(),
            self.scaling,
            self.config.dropout if self.training else 0.0,
            transposed=self.shape.kind is LayerKind.conv1d,
            blocks=self.weight_blocks,
        )

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return *self._pair(), self.scaling

    def stacked_factors(self) -> tuple[Tensor, Tensor, float]:
        experts, out = self.shape.experts, self.shape.out_features
        A = self.lora_A.view(experts, self.rank, -1)
        B = self.lora_B.view(out, self.rank, experts).permute(2, 0, 1)
        return A, B, self.scaling

    def adapter_tensors(self) -> dict[str, Tensor]:
        if self.shape.kind is LayerKind.embedding:
            return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
        own: dict[str, Tensor] = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.start_A is None or self.start_B is None:
            return own
        return {**own, "start_A": self.start_A, "start_B": self.start_B}

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """ΔW = s·B A times ``scale``: in B, and in B₀ of a subtracted start."""
        names = ("lora_B.weight", "lora_embedding_B", "start_B")
        own = self.adapter_tensors()
        return {name: value * scale if name in names else value for name, value in own.items()}

    def peft_tensors(self) -> dict[str, Tensor]:
        """With a subtracted start, plain LoRA of twice the rank: A over A₀, and B beside −B₀."""
        if self.start_A is None or self.start_B is None:
            return self.adapter_tensors()
        return {
            "lora_A.weight": torch.cat([self.lora_A, self.start_A]),
            "lora_B.weight": torch.cat([self.lora_B, -self.start_B], dim=1),
        }

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.start_A is None:
            self.load_adapter_tensors(tensors)
            return
        A, start_A = tensors["lora_A.weight"].chunk(2)
        B, minus_start_B = tensors["lora_B.weight"].chunk(2, dim=1)
        factors = {"lora_A.weight": A, "lora_B.weight": B}
        self.load_adapter_tensors({**factors, "start_A": start_A, "start_B": -minus_start_B})


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
    return scaled_as(base, product)
