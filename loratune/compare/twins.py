"""Contenders that are one training under two names, recognised before any of them is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.adapters.config import AdapterConfig, LayerKind, LayerShape
from loratune.adapters.training_form import ScaledLayer, TrainingForm, UpdateRule, rounded
from loratune.compare.plan import VariantSearch
from loratune.compare.result import Twin
from loratune.compare.settings import Setting
from loratune.config.convert import to_plain
from loratune.config.schema import RunConfig, TargetsConfig, trained_tokens
from loratune.errors import ConfigError, raise_together
from loratune.targets.find import alpha_for, rank_for

Layers = Callable[[TargetsConfig], Sequence[LayerShape]]


def require_distinct(searches: Sequence[VariantSearch]) -> None:
    """Check that no two contenders are one setting, searched in one way.

    Raises:
        ConfigError: for each that another is already.
    """
    errors: list[ConfigError] = []
    seen: list[VariantSearch] = []
    for one in searches:
        same = next((other for other in seen if _is_one_setting(one, other)), None)
        if same is None:
            seen.append(one)
            continue
        first, second = same.setting.label, one.setting.label
        cause = f"{first} and {second} are one setting" if first != second else f"{first} is twice"
        errors.append(ConfigError(cause, where="variants", fix="leave one of them out"))
    raise_together(errors)


def _is_one_setting(one: VariantSearch, other: VariantSearch) -> bool:
    return one.search == other.search and _identity(one) == _identity(other)


def _identity(one: VariantSearch) -> list[Any]:
    rates = {point.ratio for point in one.search.points}
    config = next(iter(one.search.points)).applied(one.setting.config)
    return [to_plain(config), sorted(rates, key=str), dict(one.setting.changes)]


@dataclass(frozen=True)
class _Family:
    """All trainings that a search may try, as forms.

    Attributes:
        keys: of the forms, the rate left out.
        rates: tried in the first round, as rates that go with these forms.
        factor: what a rate is multiplied with to go with its form.
    """

    keys: frozenset[tuple[Any, ...]]
    rates: tuple[float, ...]
    factor: float

    def covers(self, other: _Family) -> bool:
        """Whether both search the same trainings; a single rate must be the same one."""
        if self.keys != other.keys:
            return False
        if len(self.rates) == 1 or len(other.rates) == 1:
            return self.rates == other.rates
        return min(self.rates) <= max(other.rates) and min(other.rates) <= max(self.rates)


def find_twins(searches: Sequence[VariantSearch], layers: Layers) -> tuple[list[Twin], list[Twin]]:
    """The contenders that are the same training as an earlier one, and those that nearly are.

    Args:
        searches: in the order asked for.
        layers: those that targets name.

    Returns:
        twins; and pairs that only the optimizer's settings keep apart, with these settings.
    """
    families = {one.setting.label: _family(one, layers, ideal=False) for one in searches}
    ideal = {one.setting.label: _family(one, layers, ideal=True) for one in searches}
    twins: list[Twin] = []
    nearly: list[Twin] = []
    for place, one in enumerate(searches):
        label, earlier = one.setting.label, [other.setting.label for other in searches[:place]]
        if first := _first(families, label, [o for o in earlier if o not in _labels(twins)]):
            factor = families[label].factor / families[first].factor
            twins.append(Twin(label=label, of=first, rate_factor=factor))
        elif first := _first(ideal, label, earlier):
            factor = ideal[label].factor / ideal[first].factor
            apart = _rule(one.setting).obstacles()
            nearly.append(Twin(label=label, of=first, rate_factor=factor, but=apart))
    return twins, nearly


def _labels(twins: Sequence[Twin]) -> set[str]:
    return {twin.label for twin in twins}


def _first(families: Mapping[str, _Family], label: str, earlier: Sequence[str]) -> str:
    return next((other for other in earlier if families[other].covers(families[label])), "")


def _family(one: VariantSearch, layers: Layers, *, ideal: bool) -> _Family:
    setting = one.setting
    rule = _rule(setting)
    forms = [
        (point.lr, _form(point.applied(setting.config), setting.recipe, layers, rule, ideal))
        for point in one.search.points
    ]
    shared = tuple(sorted((key, str(value)) for key, value in _shared(setting).items()))
    keys = frozenset((*form.key, *shared) for _, form in forms)
    rates = tuple(sorted({rounded(form.lr) for _, form in forms}))
    return _Family(keys, rates, forms[0][1].lr / forms[0][0])


def _shared(setting: Setting) -> dict[str, Any]:
    """What else decides the training; which layers are adapted, the form itself says."""
    changes = dict(setting.changes)
    return {k: v for k, v in changes.items() if k.partition(".")[0] != "targets"} | {
        "modules_to_save": setting.recipe.targets.modules_to_save,
        "tokens": trained_tokens(setting.recipe),
    }


def _form(
    config: AdapterConfig, recipe: RunConfig, layers: Layers, rule: UpdateRule, ideal: bool
) -> TrainingForm:
    scaled = []
    for shape in layers(recipe.targets):
        rank = rank_for(shape.name, config)
        scaling = config.scaling(rank, alpha_for(shape.name, config))
        is_embedding = shape.kind is LayerKind.embedding
        scaled.append(ScaledLayer(shape.name, rank, scaling, is_embedding))
    return config.training_form(scaled, rule.without_obstacles() if ideal else rule)


def _rule(setting: Setting) -> UpdateRule:
    recipe = setting.recipe
    others = [*recipe.targets.modules_to_save, *trained_tokens(recipe)]
    trainer = recipe.trainer
    return UpdateRule(trainer.eps, trainer.weight_decay, trainer.clip_norm, not others)
