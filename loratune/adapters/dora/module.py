"""DoRA's layer (arXiv:2402.09353): LoRA's direction, and a trained magnitude for every output."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import Adapter, LayerPlan, RowWriter, data_device
from loratune.adapters.config import LayerKind
from loratune.adapters.dora.config import DoRAConfig
from loratune.adapters.kernels.blocks import frozen_linear
from loratune.adapters.kernels.lora import fused_lora_linear
from loratune.adapters.kernels.output_norms import output_norms
from loratune.adapters.lora.initialization import initial_parameters
from loratune.adapters.lora.module import embedding_product

_CacheKey = tuple[object, ...]


class DoRA(Adapter):
    """y = g ⊙ (W x + s·B A x) + bias with g = m/‖W + s·B A‖, the norm of every output's weights.

    As in PEFT, m starts as the norms of W, dropout acts on both products of the corrected path,
    and an embedding's outputs are the columns of its weight.
    """

    def __init__(self, plan: LayerPlan, config: DoRAConfig) -> None:
        super().__init__(plan, config)
        self.exact_gradient = config.exact_gradient
        self.lora_A, self.lora_B = initial_parameters(plan, config.init, self.scaling)
        weight = plan.weight()
        self.lora_magnitude_vector = nn.Parameter(
            torch.ones(plan.shape.out_features, device=data_device(weight))
            if weight.is_meta
            else self._norms(weight).detach()
        )
        self._norms_in_use: tuple[_CacheKey, Tensor] | None = None

    # -- the correction --------------------------------------------------------------------

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        if self.shape.kind is not LayerKind.embedding:
            return super().output(x, y)
        gain = self._gain(self._norms_in_pefts_order())
        return gain * y + self._looked_up(x, gain)

    def delta(self, x: Tensor, y: Tensor) -> Tensor:
        gain = self._gain(self._norms_in_pefts_order())
        if self.shape.kind is LayerKind.embedding:
            return (gain - 1) * y + self._looked_up(x, gain)
        x = x.to(self.lora_A.dtype)
        if self.training and self.config.dropout:
            x = self.dropout(x)
            product = self._product(x)
        else:
            product = y if self.bias is None else y - self.bias
        low_rank = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return (gain - 1) * product + gain * low_rank * self.scaling

    def _product(self, x: Tensor) -> Tensor:
        """W x without the bias, in x's number format."""
        if self.weight_blocks is not None:
            return frozen_linear(x, self.weight_blocks, None, self.out_features)
        return F.linear(x, self._by_output(self.weight).to(x.dtype))

    def _looked_up(self, ids: Tensor, gain: Tensor) -> Tensor:
        """The scaled product B A for an embedding's tokens, times g."""
        return embedding_product(self.base_layer, ids, self.lora_A, self.lora_B, gain, self.scaling)

    def fused_forward(self, x: Tensor) -> Tensor | None:
        """LoRA's kernel for both products, then the gain: y's size is kept once more for ∂m."""
        drops = self.training and self.config.dropout > 0
        if drops or self.shape.kind is LayerKind.embedding or not self._base_is_plain():
            return None
        product = fused_lora_linear(
            x,
            self.stored_weight,
            None,
            self.lora_A,
            self.lora_B,
            self.scaling,
            transposed=self.shape.kind is LayerKind.conv1d,
            blocks=self.weight_blocks,
        )
        # In half precision g stays in fp32: most of what it learns is less than one rounding.
        gain = self._gain(self._current_norms())
        with torch.autocast(x.device.type, enabled=False):
            y = product * gain if self.bias is None else torch.addcmul(self.bias, product, gain)
        return y.to(product.dtype)

    def delta_rows(self, weight: Tensor, rows: slice) -> Tensor:
        return self._rows(weight, rows, self._gain(self._norms(weight)))

    def row_writer(self, weight: Tensor) -> RowWriter:
        """The norms, which need the whole weight, are computed once."""
        gain = self._gain(self._norms(weight))

        def write(rows: slice, out: Tensor) -> None:
            out.copy_(self._rows(weight, rows, gain))

        return write

    def _rows(self, weight: Tensor, rows: slice, gain: Tensor) -> Tensor:
        """Rows of g ⊙ (W + s·BA) − W, as (g − 1) ⊙ W + g ⊙ s·BA."""
        base = weight[rows].to(self.lora_A)
        if self._stores_input_first:
            low_rank = torch.mm(self.lora_A.T[rows], self.lora_B.T)
            return (gain - 1) * base + gain * low_rank * self.scaling
        low_rank, by_row = torch.mm(self.lora_B[rows], self.lora_A), gain[rows, None]
        return (by_row - 1) * base + by_row * low_rank * self.scaling

    # -- norms -----------------------------------------------------------------------------

    @property
    def _stores_input_first(self) -> bool:
        return self.shape.kind is not LayerKind.linear

    def _by_output(self, weight: Tensor) -> Tensor:
        return weight.T if self._stores_input_first else weight

    def _gain(self, norms: Tensor) -> Tensor:
        """m/‖V‖; an output whose weights are all zero stays at zero."""
        return self.lora_magnitude_vector / torch.where(norms > 0, norms, 1.0)

    def _norms(self, weight: Tensor) -> Tensor:
        first = self._stores_input_first
        return output_norms(weight, self.lora_A, self.lora_B, self.scaling, input_first=first)

    def _norms_in_pefts_order(self) -> Tensor:
        """‖V‖ with V formed whole, by the operations that PEFT makes."""
        with torch.autocast(self.stored_weight.device.type, enabled=False):
            low_rank = F.linear(self.lora_A.T.contiguous(), self.lora_B).T
        weight = self._by_output(self.weight).to(low_rank.dtype)
        if not self.exact_gradient:
            low_rank = low_rank.detach()
        norms: Tensor = torch.linalg.norm(weight + self.scaling * low_rank, dim=1)
        return norms

    def _current_norms(self) -> Tensor:
        """‖V‖; outside training computed again only when a tensor has changed."""
        if self.exact_gradient and torch.is_grad_enabled():
            return self._norms(self.weight)
        with torch.no_grad():
            if self.training or torch.compiler.is_compiling():
                return self._norms(self.weight)
            key = tuple(map(_state_of, (self.stored_weight, self.lora_A, self.lora_B)))
            if self._norms_in_use is None or self._norms_in_use[0] != key:
                self._norms_in_use = (key, self._norms(self.weight))
            return self._norms_in_use[1]

    def train(self, mode: bool = True) -> Self:
        """Forget the norms: a sharded parameter may change without a sign of it."""
        self._norms_in_use = None
        return super().train(mode)

    @torch.no_grad()
    def scaled_tensors(self, scale: float) -> dict[str, Tensor]:
        """B times ``scale``, and the magnitude as far on its way from ‖W‖.

        W + scale · ΔW would change direction and magnitude by other shares than these.
        """
        *names, magnitude = own = self.adapter_tensors()
        base_norms = output_norms(
            self.weight,
            self.lora_A,
            torch.zeros_like(self.lora_B),
            self.scaling,
            input_first=self._stores_input_first,
        )
        return {
            names[0]: own[names[0]],
            names[1]: self.lora_B * scale,
            magnitude: torch.lerp(base_norms, self.lora_magnitude_vector, scale),
        }

    def adapter_tensors(self) -> dict[str, Tensor]:
        is_embedding = self.shape.kind is LayerKind.embedding
        names = ("lora_embedding_A", "lora_embedding_B")
        names = names if is_embedding else ("lora_A.weight", "lora_B.weight")
        return {
            names[0]: self.lora_A,
            names[1]: self.lora_B,
            "lora_magnitude_vector": self.lora_magnitude_vector,
        }


def _state_of(tensor: Tensor) -> _CacheKey:
    # Inference tensors keep no version, and so could change unnoticed: they never match.
    return (object(),) if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
