"""MiSS's layer (arXiv:2409.15371): a trained shard, shared by all shards of a layer's inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import LayerPlan, data_device
from loratune.adapters.low_rank import LowRank
from loratune.adapters.miss.config import MiSSConfig


class MiSS(LowRank):
    """y = W x + Dᵀ (x₁ + x₂ + ...), with xᵢ the shards of drop(x), r inputs each, and D (r, out).

    Where r does not divide the inputs, the last shard ends in zeros.  As a matrix ΔW[o, i] =
    D[i mod r, o].  D starts at zero.  The order of operations is PEFT's: equal to the bit in fp32
    on a CPU.

    Attributes:
        miss_block: D, (rank, out_features).
    """

    def __init__(self, plan: LayerPlan, config: MiSSConfig) -> None:
        super().__init__(plan, config)
        shard = torch.zeros(
            plan.rank, plan.shape.out_features, device=data_device(self.stored_weight)
        )
        self.miss_block = nn.Parameter(shard)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        missing = -self.in_features % self.rank
        padded = F.pad(x, (0, missing)) if missing else x
        dropped = self.dropout(padded.to(self.miss_block.dtype))
        count = dropped.shape[-1] // self.rank
        shards = dropped.reshape(*dropped.shape[:-1], count, self.rank)
        return torch.matmul(shards.sum(dim=-2), self.miss_block)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """S (r, in) and Dᵀ (out, r), unscaled."""
        D = self.miss_block
        eye = torch.eye(self.rank, device=D.device, dtype=D.dtype)
        shards = -(-self.in_features // self.rank)
        return eye.repeat(1, shards)[:, : self.in_features], D.T, 1.0

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"miss_block": self.miss_block}

    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """ΔW times ``scale``, in D."""
        return {"miss_block": self.miss_block * scale}
