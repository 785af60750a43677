"""What the command line asks for: settings of variants, comparable by rank, numbers or bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loratune.adapters.config import AdapterConfig, LayerShape
from loratune.adapters.registry import config_class, variant_names
from loratune.compare.search import search_axis
from loratune.config.composition import to_typed
from loratune.config.recipes.variant_settings import variant_settings
from loratune.counting.budget import Budget, match_budget, parse_budget
from loratune.counting.parameters import count_in
from loratune.errors import ConfigError, did_you_mean, raise_together
from loratune.models.architectures import Architecture

MATCHES = ("own", "rank", "trainable", "bytes")


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe.

    Attributes:
        variants: see ``named_settings``.
        match: see ``match_ranks``.
        seeds: how many final trainings each setting gets; 0 for a search alone.
        lr_grid: learning rates for every variant, instead of a grid around its own.
        ratio_grid: values of the setting that a variant searches beside its rate (LoRA+'s ratio),
            instead of the recipe's.
        processes: how many work on it here.
        part: ``(K, N)``: this process is the Kth of N that were started separately.
        retry: do failed tasks again.
        folders: the user's recipe folders.
    """

    variants: Any = "all"
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
        label: unique, made of letters, digits and ``_``: it names files as well.
        notes: what to know about it, one sentence each.
    """

    label: str
    config: AdapterConfig
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Value of the setting that the variant searches beside its learning rate, if any."""
        axis = search_axis(self.config)
        return float(getattr(self.config, axis)) if axis else None


def named_settings(
    wanted: Any, chosen: AdapterConfig, folders: Sequence[Path] = ()
) -> list[Setting]:
    """The settings that ``variants=`` names.

    Args:
        wanted: ``all``, one name, or a list of names and of mappings such as
            ``{variant: lora, rank: 16}``.
        chosen: the recipe's own adapter; it stands for its variant as it is.
        folders: the user's recipe folders, whose ``adapter/NAME.yaml`` count.

    Raises:
        ConfigError: for each entry that names no variant or has a setting it does not know.
    """
    entries = _entries(wanted)
    errors: list[ConfigError] = []
    configs: list[AdapterConfig] = []
    for entry in entries:
        try:
            configs.append(_config(entry, chosen, folders))
        except ConfigError as error:
            errors.append(error)
    raise_together(errors)
    if not configs:
        raise ConfigError("no variant is named", where="variants", fix="variants=all")
    return list(map(Setting, _labels(configs), configs))


def _entries(wanted: Any) -> list[Any]:
    if wanted in (None, "all"):
        return list(variant_names())
    return list(wanted) if isinstance(wanted, (list, tuple)) else str(wanted).split(",")


def _config(entry: Any, chosen: AdapterConfig, folders: Sequence[Path]) -> AdapterConfig:
    values = dict(entry) if isinstance(entry, Mapping) else {"variant": str(entry).strip()}
    name = str(values.pop("variant", ""))
    if name not in variant_names():
        fix = did_you_mean(name, variant_names()) or f"choose among {', '.join(variant_names())}"
        raise ConfigError(f"no adapter variant named '{name}'", where="variants", fix=fix)
    start = chosen if name == chosen.variant else variant_settings(name, folders)
    names = {field.name for field in fields(config_class(name))} - {"variant"}
    unknown = [str(key) for key in values if key not in names]
    if unknown:
        fix = did_you_mean(unknown[0], names) or f"known here: {', '.join(sorted(names))}"
        raise ConfigError(f"{name} has no setting '{unknown[0]}'", where="variants", fix=fix)
    config = to_typed(start, values, "variants")
    assert isinstance(config, AdapterConfig)
    return config


def _labels(configs: Sequence[AdapterConfig]) -> list[str]:
    """The variants' names, with the rank where a variant comes twice, with a number if it must."""
    names = [config.variant for config in configs]
    labels: list[str] = []
    for config in configs:
        label = config.variant
        if names.count(label) > 1:
            label = f"{label}_r{config.rank}"
        number, unique = 2, label
        while unique in labels:
            unique, number = f"{label}_{number}", number + 1
        labels.append(unique)
    return labels


# -- matching ------------------------------------------------------------------------------


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
    chosen: AdapterConfig,
    architecture: Architecture,
    layers: Sequence[LayerShape],
    modules_to_save: Sequence[str] = (),
) -> list[Setting]:
    """The settings at ranks that make them comparable.

    ``own`` leaves every rank as it is; ``rank`` gives all of them the recipe's; ``trainable`` and
    ``bytes`` give each the highest rank that stays within what the recipe's own adapter takes, or
    within the budget that is written out.

    Raises:
        ConfigError: if a setting cannot stay within the budget: nothing would be compared.
    """
    quantity, budget = parse_match(match)
    if quantity == "own":
        return list(settings)
    if quantity == "rank":
        return [replace(s, config=s.config.with_rank(chosen.rank)) for s in settings]
    if budget is None:
        count = count_in(architecture, layers, chosen, modules_to_save)
        budget = Budget(quantity, Budget(quantity, 0).spent(count))
    configs = [setting.config for setting in settings]
    matches = match_budget(architecture, layers, configs, budget, modules_to_save=modules_to_save)
    pairs = list(zip(settings, matches, strict=True))
    words = "trained numbers" if quantity == "trainable" else "stored bytes"
    raise_together(
        ConfigError(
            f"{setting.label} cannot stay within {budget.limit:,} {words}: {one.least}",
            where="match",
            fix="raise the budget, or leave it out of variants",
        )
        for setting, one in pairs
        if one.rank is None
    )
    return [
        replace(
            setting,
            config=setting.config.with_rank(one.rank or 1),
            notes=(*setting.notes, one.note) if one.note else setting.notes,
        )
        for setting, one in pairs
    ]
