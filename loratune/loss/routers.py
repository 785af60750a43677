"""The load-balancing loss of a mixture of experts' routers (arXiv:2101.03961, equations 4 to 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class RouterLoss:
    """A model's own load-balancing loss, times the model's own coefficient.

    Attributes:
        coefficient: weight beside the tokens' mean loss.
        top_k: experts that each token is sent to.
    """

    coefficient: float
    top_k: int

    def __call__(self, logits: Sequence[Tensor], computed: Tensor) -> Tensor:
        """The loss over all layers, each token of each layer once.

        Args:
            logits: of every router, (tokens, experts).
            computed: (tokens) whether a token is not padding.
        """
        weight = computed.flatten().float()[:, None]
        experts = logits[0].shape[-1]
        chosen = torch.zeros(experts, device=weight.device)
        probable = torch.zeros(experts, device=weight.device)
        for layer in logits:
            probabilities = F.softmax(layer, dim=-1)
            best = torch.topk(probabilities, self.top_k, dim=-1).indices
            chosen = chosen + (F.one_hot(best, experts).sum(dim=1) * weight).sum(dim=0)
            probable = probable + (probabilities.float() * weight).sum(dim=0)
        rows = len(logits) * weight.sum()
        return self.coefficient * experts * torch.sum(chosen / rows * (probable / rows))


def router_coefficient(model: nn.Module) -> float:
    """Weight of the load-balancing loss that the model has for its routers; 0 if it has none."""
    numbers = _settings(model)
    if "output_router_logits" not in numbers:
        return 0.0
    found = [value for key, value in numbers.items() if key.endswith("aux_loss_coef")]
    return float(found[0] or 0.0) if found else 0.0


def router_loss(model: nn.Module) -> RouterLoss | None:
    """The model's load-balancing loss, or ``None`` where it has none that is computed this way.

    One probe decides: on a few tokens it must be the one that the model itself adds.
    """
    top_k = _settings(model).get("num_experts_per_tok")
    coefficient = router_coefficient(model)
    if not (coefficient and isinstance(top_k, int)):
        return None
    loss = RouterLoss(coefficient, top_k)
    device = next(model.parameters()).device
    ids = torch.arange(1, 8, device=device)[None]
    with torch.no_grad():
        output: Any = model(input_ids=ids, use_cache=False, output_router_logits=True)
    logits, own = getattr(output, "router_logits", None), getattr(output, "aux_loss", None)
    if not logits or not isinstance(own, Tensor):
        return None
    ours = loss(logits, torch.ones_like(ids)) / coefficient
    return loss if torch.allclose(ours, own.to(ours), rtol=1e-4) else None


def _settings(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    return dict(vars(find() if callable(find) else config)) if config is not None else {}
