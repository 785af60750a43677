"""The loss on rows that nobody trains on, taken between two steps of any trainer, off the clock."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

ROWS = 64
"""Rows that are looked at."""
EVERY = 3
"""Steps between two looks."""
IGNORED = -100


class DevLoss:
    """The same rows, in the same padding, for every trainer; few at a time, to be no one's peak."""

    def __init__(self, encoded: Path, batch: int = 4) -> None:
        rows = json.loads(encoded.read_text(encoding="utf-8"))["dev"]
        rows.sort(key=lambda row: len(row["ids"]))
        self._batches = [_padded(rows[at : at + batch]) for at in range(0, len(rows), batch)]

    @torch.no_grad()
    def of(self, model: nn.Module) -> float:
        """Nats a supervised token; the model is left in the mode it had."""
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        for ids, mask, labels in self._batches:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            targets = labels[:, 1:]
            chosen = targets != IGNORED
            losses = nn.functional.cross_entropy(
                logits[chosen].float(), targets[chosen], reduction="sum"
            )
            total, count = total + float(losses), count + int(chosen.sum())
        model.train(was_training)
        return total / count


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and labels (B, T), padded on the right."""
    length = max(len(row["ids"]) for row in rows)

    def filled(lists: Sequence[list[int]], value: int) -> Tensor:
        return torch.tensor([one + [value] * (length - len(one)) for one in lists])

    mask = filled([[1] * len(row["ids"]) for row in rows], 0)
    return (
        filled([row["ids"] for row in rows], 0),
        mask,
        filled([r["labels"] for r in rows], IGNORED),
    )


def seconds_to(target: float, looks: Sequence[Mapping[str, float]]) -> float | None:
    """Seconds of training after which the loss first lies at ``target``, between looks linearly.

    Args:
        target: nats.
        looks: ``seconds`` passed and ``loss`` then, in order.

    Returns:
        ``None`` where it never gets there.
    """
    before: Mapping[str, float] | None = None
    for look in looks:
        if look["loss"] <= target:
            if before is None:
                return look["seconds"]
            share = (before["loss"] - target) / (before["loss"] - look["loss"])
            return before["seconds"] + share * (look["seconds"] - before["seconds"])
        before = look
    return None


def common_target(contenders: Sequence[Sequence[Mapping[str, float]]]) -> float:
    """The lowest loss that every contender reaches."""
    return max(min(look["loss"] for look in looks) for looks in contenders)
