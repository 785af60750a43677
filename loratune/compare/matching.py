"""Ranks at which settings are comparable: the same rank, as many trained numbers, as many bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from loratune.adapters.config import LayerShape
from loratune.compare.settings import Setting
from loratune.config.schema import RunConfig, TargetsConfig
from loratune.counting.budget import Budget, BudgetMatch, match_budget, parse_budget
from loratune.counting.parameters import count_in
from loratune.errors import ConfigError, did_you_mean, raise_together
from loratune.models.architectures import Architecture

MATCHES = ("own", "rank", "trainable", "bytes")


def parse_match(text: str) -> tuple[str, Budget | None]:
    """``own``, ``rank``, ``trainable``, ``bytes``, or a budget such as ``trainable:589824``.

    Raises:
        ConfigError: if it is none of these.
    """
    if text in MATCHES:
        return text, None
    if re.match(r"(trainable|bytes):", text):
        budget = parse_budget(text)
        return budget.quantity, budget
    fix = did_you_mean(text, MATCHES) or f"choose one of {', '.join(MATCHES)}"
    raise ConfigError(f"unknown match '{text}'", where="match", fix=fix)


def match_ranks(
    settings: Sequence[Setting],
    match: str,
    common: RunConfig,
    architecture: Architecture,
    layers: Callable[[TargetsConfig], Sequence[LayerShape]],
) -> list[Setting]:
    """The settings at ranks that make them comparable.

    ``own`` leaves every rank as it is; ``rank`` gives all of them the recipe's; ``trainable`` and
    ``bytes`` give each the highest rank that stays within what the recipe's own adapter takes, or
    within the budget that is written out.

    Args:
        settings: what is compared.
        match: see above.
        common: the recipe that they have in common.
        architecture: of the base.
        layers: those that targets name.

    Raises:
        ConfigError: if a setting cannot stay within the budget: nothing would be compared.
    """
    quantity, budget = parse_match(match)
    if quantity == "own":
        return list(settings)
    if quantity == "rank":
        rank = common.adapter.rank
        return [one.with_adapter(one.config.with_rank(rank)) for one in settings]
    if budget is None:
        saved = common.targets.modules_to_save
        count = count_in(architecture, layers(common.targets), common.adapter, saved)
        budget = Budget(quantity, Budget(quantity, 0).spent(count))
    matches = [_match(one, budget, architecture, layers) for one in settings]
    words = "trained numbers" if quantity == "trainable" else "stored bytes"
    raise_together(
        ConfigError(
            f"{setting.label} cannot stay within {budget.limit:,} {words}: {one.least}",
            where="match",
            fix="raise the budget, or leave it out of variants",
        )
        for setting, one in zip(settings, matches, strict=True)
        if one.rank is None
    )
    return [
        setting.with_adapter(setting.config.with_rank(one.rank or 1), *filter(None, [one.note]))
        for setting, one in zip(settings, matches, strict=True)
    ]


def _match(
    setting: Setting,
    budget: Budget,
    architecture: Architecture,
    layers: Callable[[TargetsConfig], Sequence[LayerShape]],
) -> BudgetMatch:
    targets = setting.recipe.targets
    [one] = match_budget(
        architecture,
        layers(targets),
        [setting.config],
        budget,
        modules_to_save=targets.modules_to_save,
    )
    return one
