"""How many positions a model knows: a table of that many rows, or a formula that goes on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "position_embedding")


def positions(model: Any) -> int | None:
    """Positions that the model was made for; None where its config names none."""
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return named if isinstance(named, int) and named > 0 else None


def learned_positions(model: Any) -> int | None:
    """Positions of a model that reads them from a table and cannot go beyond it, or None.

    OPT and GPT-2 have learned ones; GPT-J has a fixed table.  Rotary positions are computed.
    """
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in _TABLES and isinstance(module, nn.Embedding):
            return positions(model) or module.num_embeddings
        table = getattr(module, "embed_positions", None)
        if isinstance(table, Tensor) and table.dim() == 2:
            return positions(model) or len(table)
    return None
