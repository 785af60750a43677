"""Turns without loss: why they have none, and how that is said of a row and of all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

WEIGHT = "weight: 0"
TRAIN = "train: false"
IN_PROMPT = "in the prompt"
IN_HISTORY = "in `history`"
LEARN = "data.learn=last"
REASONING = "data.reasoning=context"
"""Reasons why an assistant turn is not supervised; the last is for a turn that only thinks."""


def unsupervised_turns(reasons: Iterable[str]) -> str:
    """``2 assistant turns not supervised (weight: 0)``; an empty string for none.

    Args:
        reasons: why, one for each such turn.
    """
    counts = Counter(reasons)
    if not counts:
        return ""
    each = ", ".join(f"{why} ×{count:,}" for why, count in counts.items())
    words = each if len(counts) > 1 else next(iter(counts))
    turns = "turn" if counts.total() == 1 else "turns"
    return f"{counts.total():,} assistant {turns} not supervised ({words})"


def all_masked(count: int, rows: int, reasons: Iterable[str]) -> str:
    """What is wrong with rows whose every turn is without loss.

    Args:
        count: how many there are.
        rows: of how many.
        reasons: why the turns of the first such row are.
    """
    why = ", ".join(dict.fromkeys(reasons))
    return (
        f"{count:,} of {rows:,} rows have no supervised token left, since every turn that would be "
        f"is masked ({why})"
    )


def unmask(reasons: Iterable[str]) -> str:
    """What to do about it."""
    ways = {
        WEIGHT: "set weight: 1 on the last turn",
        TRAIN: "set train: true on the last turn",
        LEARN: "set data.learn=all",
        REASONING: "set data.reasoning=learn",
    }
    named = [ways[why] for why in dict.fromkeys(reasons) if why in ways]
    return " or ".join([*named, "remove the row"])
