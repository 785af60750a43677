"""The scores of an evaluation, base and adapted side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.tables import Table
from loratune.units import percent, significant

_SCORES = (
    ("loss, nats per token", "loss", significant),
    ("perplexity", "perplexity", significant),
    ("token accuracy", "token_accuracy", percent),
    ("exact match", "exact_match", percent),
)


def score_table(evaluation: Mapping[str, Any], caption: str = "") -> Table:
    """What ``evaluation.json`` says, as a table."""
    sides = [(name, evaluation.get(name)) for name in ("base", "adapted")]
    measured = [(name, scores) for name, scores in sides if scores]
    rows = tuple(
        (label, *(form(scores.get(key)) for _, scores in measured))
        for label, key, form in _SCORES
        if any(scores.get(key) is not None for _, scores in measured)
    )
    names = dict.fromkeys(n for _, scores in measured for n in scores.get("source_losses") or {})
    rows += tuple(
        (f"loss on {n}", *(significant((s.get("source_losses") or {}).get(n)) for _, s in measured))
        for n in names
    )
    title = f"evaluation on {evaluation.get('rows', 0):,} rows"
    return Table(title, ("", *(name for name, _ in measured)), rows, caption=caption)
