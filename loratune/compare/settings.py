"""What the command line asks for: which settings are compared, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import variant_names
from loratune.compare.contenders import Overrides, contender_recipe, training_changes
from loratune.compare.search import search_axis
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, LoratuneError, SeveralErrors, choose_one, raise_together


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe.

    Attributes:
        variants: see ``named_settings``.
        match: see ``matching.match_ranks``.
        seeds: how many final trainings each setting gets; 0 for a search alone.
        lr_grid: learning rates for every variant, instead of a grid around its own.
        ratio_grid: values of the setting that a variant searches beside its rate (LoRA+'s ratio),
            instead of the recipe's.
        processes: how many work on it here.
        part: ``(K, N)``: this process is the Kth of N that were started separately.
        retry: do failed tasks again.
        folders: the user's recipe folders.
    """

    variants: Any = None
    match: str = "own"
    seeds: int = 3
    lr_grid: Sequence[float] | None = None
    ratio_grid: Sequence[float] | None = None
    processes: int = 1
    part: tuple[int, int] = (1, 1)
    retry: bool = False
    folders: Sequence[Path] = ()


def parse_part(text: str) -> tuple[int, int]:
    """``2/4`` as ``(2, 4)``.

    Raises:
        ConfigError: if it is not K/N with 1 <= K <= N.
    """
    parsed = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    number, count = (int(parsed[1]), int(parsed[2])) if parsed else (0, 0)
    if not 1 <= number <= count:
        fix = "use part=1/4 to part=4/4"
        raise ConfigError(f"part must be K/N, not '{text}'", where="part", fix=fix)
    return number, count


@dataclass(frozen=True)
class Setting:
    """One setting under comparison.

    Attributes:
        label: unique, made of letters, digits, ``_``, ``-`` and ``.``: it names files as well.
        recipe: what is trained.
        changes: dotted settings outside the adapter that differ from what the others share.
        overrides: the contender as it was asked for; empty for a variant's name alone.
        notes: what to know about it, one sentence each.
    """

    label: str
    recipe: RunConfig
    changes: Mapping[str, Any] = field(default_factory=dict)
    overrides: Overrides = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> AdapterConfig:
        """The adapter."""
        return self.recipe.adapter

    @property
    def ratio(self) -> float | None:
        """Value of the setting that the variant searches beside its learning rate, if any."""
        axis = search_axis(self.config)
        return float(getattr(self.config, axis)) if axis else None

    def with_adapter(self, config: AdapterConfig, *notes: str) -> Setting:
        """The same with another adapter, and something more to know about it."""
        recipe = replace(self.recipe, adapter=config)
        return replace(self, recipe=recipe, notes=(*self.notes, *notes))


def named_settings(wanted: Any, recipe: RunConfig, folders: Sequence[Path] = ()) -> list[Setting]:
    """The settings that ``variants=`` and ``compare.contenders`` name.

    Args:
        wanted: ``None`` for the recipe's contenders, or every variant where it has none;
            ``all`` for every variant; one name, or a list of names, of contenders or variants,
            and of mappings such as ``{variant: lora, rank: 16}``.
        recipe: what they have in common; its adapter stands for its variant as it is.
        folders: the user's recipe folders, whose ``adapter/NAME.yaml`` count.

    Raises:
        ConfigError: for each entry that names nothing or has a setting that does not exist.
    """
    contenders = recipe.compare.contenders
    errors: list[LoratuneError] = []
    settings: list[Setting] = []
    for label, overrides, where in _entries(wanted, contenders):
        try:
            changed = contender_recipe(recipe, overrides, where, folders)
        except LoratuneError as error:
            errors += _at(where, error)
            continue
        asked = {} if list(overrides) == ["adapter"] and not label else dict(overrides)
        settings.append(Setting(label, changed, training_changes(changed, recipe), asked))
    raise_together(errors)
    if not settings:
        raise ConfigError("no variant is named", where="variants", fix="variants=all")
    labels = _labels(settings)
    return [replace(one, label=label) for one, label in zip(settings, labels, strict=True)]


def _entries(wanted: Any, contenders: Mapping[str, Any]) -> list[tuple[str, Overrides, str]]:
    """Label (empty where the variant's name will do), overrides and place of each entry."""
    if wanted is None:
        wanted = list(contenders) or "all"
    if wanted == "all":
        wanted = list(variant_names())
    listed = list(wanted) if isinstance(wanted, (list, tuple)) else str(wanted).split(",")
    return [_entry(one, contenders) for one in listed]


def _entry(entry: Any, contenders: Mapping[str, Any]) -> tuple[str, Overrides, str]:
    if isinstance(entry, Mapping):
        values = {str(key): value for key, value in entry.items()}
        own = {f"adapter.{key}": value for key, value in values.items() if key != "variant"}
        return "", {"adapter": str(values.get("variant", "")), **own}, "variants"
    name = str(entry).strip()
    if name not in contenders:
        if contenders and name not in variant_names():
            fix = choose_one(name, [*contenders, *variant_names()])
            cause = f"no adapter variant or contender named '{name}'"
            raise ConfigError(cause, where="variants", fix=fix)
        return "", {"adapter": name}, "variants"
    overrides, where = contenders[name], f"compare.contenders.{name}"
    _check_label(name, where)
    if not isinstance(overrides, Mapping):
        fix = f"write {{{name}: {{adapter.rank: 4}}}}"
        raise ConfigError(f"{overrides!r} is not a mapping of settings", where=where, fix=fix)
    return name, overrides, where


def _at(where: str, error: LoratuneError) -> list[LoratuneError]:
    """Each problem of a contender, with its place."""
    parts = error.errors if isinstance(error, SeveralErrors) else [error]
    return [
        part
        if where in part.where
        else type(part)(part.cause, where=f"{where}: {part.where}", fix=part.fix)
        for part in parts
    ]


def _check_label(label: str, where: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,59}", label, re.ASCII):
        fix = "use letters, digits, _, - and ., at most 60"
        raise ConfigError(f"'{label}' cannot name a contender", where=where, fix=fix)


def _labels(settings: Sequence[Setting]) -> list[str]:
    """Labels of their own; else the variant, with the rank or a number where it comes twice."""
    names = [one.config.variant for one in settings if not one.label]
    taken = {one.label for one in settings if one.label}
    labels: list[str] = []
    for one in settings:
        label = one.label or one.config.variant
        if not one.label and names.count(label) > 1:
            label = f"{label}_r{one.config.rank}"
        number, unique = 2, label
        while not one.label and unique in taken:
            unique, number = f"{label}_{number}", number + 1
        taken.add(unique)
        labels.append(unique)
    return labels
