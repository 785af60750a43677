"""The rank at which each variant comes closest to the same budget, so that they compare fairly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.counting.parameters import VariantCount, count_in
from loratune.errors import ConfigError
from loratune.models.architectures import Architecture
from loratune.units import parse_bytes, parse_count

_HIGHEST_RANK = 1 << 24
_NO_RANK = "its size does not depend on the rank"


@dataclass(frozen=True, slots=True)
class Budget:
    """At most this many trainable numbers, or stored bytes."""

    quantity: str
    limit: int

    def spent(self, count: VariantCount) -> int:
        """What a variant takes of it."""
        return count.trainable if self.quantity == "trainable" else count.stored_bytes


@dataclass(frozen=True, slots=True)
class BudgetMatch:
    """How close one variant comes to a budget without exceeding it.

    Attributes:
        rank: the highest rank within the budget; ``None`` if even rank 1 exceeds it.
        reached: what that rank takes (rank 1, where none fits).
        difference: ``reached`` minus the budget.
        note: what stands against using this rank, or an empty string.
    """

    variant: str
    quantity: str
    budget: int
    rank: int | None
    reached: int
    difference: int
    note: str


def parse_budget(text: str) -> Budget:
    """``trainable:589824``, ``trainable:9.2M``, ``bytes:6MB`` or ``bytes:6MiB``.

    Raises:
        ConfigError: if it is none of these.
    """
    quantity, _, amount = text.strip().partition(":")
    limit = parse_count(amount) if quantity == "trainable" else parse_bytes(amount)
    if quantity not in ("trainable", "bytes") or limit is None:
        raise ConfigError(
            f"'{text}' is not a budget",
            where="match",
            fix="use match=trainable:589824 or match=bytes:6MB",
        )
    if limit < 1:
        raise ConfigError(f"'{text}' allows nothing", where="match", fix="use at least 1")
    return Budget(quantity, limit)


def match_budget(
    architecture: Architecture,
    matched: Sequence[LayerShape],
    configs: Sequence[AdapterConfig],
    budget: Budget,
    *,
    modules_to_save: Sequence[str] = (),
) -> list[BudgetMatch]:
    """For each variant the highest rank whose count does not exceed ``budget``.

    Ranks set by ``rank_pattern`` stay as they are.
    """

    def spent(config: AdapterConfig, rank: int) -> int:
        resized = config.with_rank(rank)
        return budget.spent(count_in(architecture, matched, resized, modules_to_save))

    matches = []
    for config in configs:
        has_rank = "rank" not in config.without_effect
        rank = _highest_rank(partial(spent, config), budget.limit)
        if rank is not None and not has_rank:
            rank = config.rank
        reached = spent(config, rank or 1)
        difference = reached - budget.limit
        note = _note(rank, matched) if has_rank or rank is None else _NO_RANK
        quantity, limit = budget.quantity, budget.limit
        matches.append(
            BudgetMatch(config.variant, quantity, limit, rank, reached, difference, note)
        )
    return matches


def _highest_rank(spent: Callable[[int], int], limit: int) -> int | None:
    """The highest rank that spends at most ``limit``; ``None`` if even rank 1 spends more."""
    if spent(1) > limit:
        return None
    low, high = 1, 2
    while high < _HIGHEST_RANK and spent(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= limit else (low, middle)
    return low


def _note(rank: int | None, matched: Sequence[LayerShape]) -> str:
    if rank is None:
        return "impossible: even rank 1 exceeds the budget"
    narrowest = min((min(s.in_features, s.out_features) for s in matched), default=rank)
    if rank > narrowest:
        return f"no rank above {narrowest}, the narrowest layer, makes the correction richer"
    return ""
