"""A few rows of an embedding, or of the output head, trained for single tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapters.base import ReadParameter, scaled_as


class TokenRows(nn.Module):
    """An embedding or a head whose rows of some tokens train; all others stay the base's.

    The rows are kept in fp32 and rounded to the base's number format where they are used.

    Attributes:
        original_module: the frozen module that was there before.
        rows: (tokens, width), what trains; a tied head has its embedding's.
        token_ids: (tokens,), whose rows these are.
        enabled: ``False`` makes the module behave as the original.
    """

    def __init__(
        self,
        module: nn.Module,
        ids: Tensor,
        rows: nn.Parameter | None = None,
        read: ReadParameter | None = None,
    ) -> None:
        """Begin with the base's own rows.

        Args:
            module: an ``nn.Embedding`` or ``nn.Linear`` with one row a token.
            ids: (tokens,), each once.
            rows: those that a tied module trains already.
            read: gives the weight's value where it has no data yet.
        """
        super().__init__()
        self.original_module = module.requires_grad_(False)
        weight = self._base_weight()
        weight = read(weight) if read and weight.is_meta else weight
        own = weight.detach()[ids].to(torch.float32, copy=True)
        self.rows = nn.Parameter(own) if rows is None else rows
        self.token_ids: Tensor
        self.register_buffer("token_ids", ids.to(weight.device), persistent=False)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.original_module(x)
        if not self.enabled:
            return y
        rows = self.rows.to(y.dtype)
        if isinstance(self.original_module, nn.Embedding):
            return self._replaced(x, y, rows)
        bias = getattr(self.original_module, "bias", None)
        logits = F.linear(x, rows, None if bias is None else bias[self.token_ids])
        return y.index_copy(-1, self.token_ids, logits)

    def _replaced(self, ids: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """The embedded ids with the trained rows in place of the base's."""
        is_trained = ids[..., None] == self.token_ids
        ours = F.embedding(is_trained.int().argmax(-1), rows)
        ours = scaled_as(self.original_module, ours)
        return torch.where(is_trained.any(-1)[..., None], ours, y)

    def _base_weight(self) -> Tensor:
        weight = self.original_module.weight
        assert isinstance(weight, Tensor)
        return weight

    def base_rows(self) -> Tensor:
        """The base's own rows of the same tokens, (tokens, width), in fp32."""
        return self._base_weight().detach()[self.token_ids].float()

    @torch.no_grad()
    def whole_weight(self) -> Tensor:
        """The whole weight with the trained rows in it, in fp32."""
        whole = self._base_weight().to(torch.float32, copy=True)
        return whole.index_copy_(0, self.token_ids, self.rows.detach())

    @property
    def weight(self) -> Tensor:
        """The weight in use, where models read ``module.weight`` directly."""
        base = self._base_weight()
        if not self.enabled or base.is_meta:
            return base
        return base.index_copy(0, self.token_ids, self.rows.to(base.dtype))

    def merged_module(self) -> nn.Module:
        """The plain module with the trained rows in its weight (a copy of its own)."""
        base = self._base_weight()
        merged = nn.Parameter(self.whole_weight().to(base.dtype), requires_grad=False)
        self.original_module.register_parameter("weight", merged)
        return self.original_module
