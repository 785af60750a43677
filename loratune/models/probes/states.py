"""What a model makes of a row, as far as the loss sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loratune.loss.causal_model import backbone_and_head, hidden_states

TOLERANCE = 1e-4
"""Largest relative difference between two ways of computing the same in fp32."""

OPERATIONS = {"cpu": 5e9}
"""Multiply-adds that one pass of a probe may cost: a tenth of a second on a usual CPU."""
_ON_AN_ACCELERATOR = 1e12
_SHORTEST = 32


def affordable_tokens(model: nn.Module) -> int:
    """Tokens of a row that a probe can compute in a moment; at least 32."""
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    parameters = list(model.parameters())
    weights = sum(parameter.numel() for parameter in parameters) - tables
    operations = OPERATIONS.get(parameters[0].device.type, _ON_AN_ACCELERATOR)
    return max(_SHORTEST, int(operations / max(1, weights)))


def ids_of(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """The tokens that the model has, as ids; any where it has none of them."""
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return torch.tensor([token for token in tokens if token < words] or range(words))


def last_states(model: nn.Module) -> Callable[..., Tensor]:
    """A function from ids (T) to the states (T, width) that the head reads.

    Where the model cannot be taken apart they are its logits (T, vocabulary).
    """
    split = backbone_and_head(model)

    def run(ids: Tensor, **inputs: Tensor) -> Tensor:
        output = (split[0] if split else model)(input_ids=ids[None], use_cache=False, **inputs)
        states: Tensor = hidden_states(output) if split else output.logits
        return states[0]

    return run
