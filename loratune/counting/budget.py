"""The rank at which each variant comes closest to the same budget, so that they compare fairly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.counting.parameters import VariantCount, count_in
from loratune.errors import ConfigError
from loratune.models.architectures import Architecture
from loratune.targets.find import refusals
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
        rank: the highest rank within the budget that every layer can have; ``None`` if even rank 1
            exceeds it.
        reached: what that rank takes (rank 1, where none fits).
        difference: ``reached`` minus the budget.
        note: what stands against using this rank, or a higher one; or an empty string.
        least: where nothing fits, what takes ``reached``.
    """

    variant: str
    quantity: str
    budget: int
    rank: int | None
    reached: int
    difference: int
    note: str
    least: str = ""


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

    A rank that a layer cannot have is not one of them.  Ranks set by ``rank_pattern`` stay as they
    are.
    """
    return [
        _match(architecture, matched, config, budget, modules_to_save=modules_to_save)
        for config in configs
    ]


def _match(
    architecture: Architecture,
    matched: Sequence[LayerShape],
    config: AdapterConfig,
    budget: Budget,
    *,
    modules_to_save: Sequence[str],
) -> BudgetMatch:
    def spent(rank: int) -> int:
        resized = config.with_rank(rank)
        return budget.spent(count_in(architecture, matched, resized, modules_to_save))

    def refusal(rank: int) -> str:
        reason, _ = next(refusals(config.with_rank(rank), matched), ("", ""))
        return reason

    def is_possible(rank: int) -> bool:
        return spent(rank) <= budget.limit and not refusal(rank)

    has_rank = "rank" not in config.without_effect
    rank: int | None = None
    if is_possible(1):
        rank = _highest(is_possible) if has_rank else config.rank
    reached = spent(rank or 1)
    least = f"rank 1 takes {reached:,}" if has_rank else f"it takes {reached:,} as it is set"
    if rank is None:
        note = f"impossible: {refusal(1) or least}"
    elif not has_rank:
        note = _NO_RANK
    else:
        note = refusal(rank + 1) if spent(rank + 1) <= budget.limit else _too_high(rank, matched)
    return BudgetMatch(
        variant=config.variant,
        quantity=budget.quantity,
        budget=budget.limit,
        rank=rank,
        reached=reached,
        difference=reached - budget.limit,
        note=note,
        least=least if rank is None else "",
    )


def _highest(is_possible: Callable[[int], bool]) -> int:
    """The highest rank that is possible, where rank 1 is."""
    low, high = 1, 2
    while high < _HIGHEST_RANK and is_possible(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_possible(middle) else (low, middle)
    return low


def _too_high(rank: int, matched: Sequence[LayerShape]) -> str:
    narrowest = min((min(s.in_features, s.out_features) for s in matched), default=rank)
    if rank > narrowest:
        return f"no rank above {narrowest}, the narrowest layer, makes the correction richer"
    return ""
