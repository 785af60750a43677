"""A contender: what one side of a comparison changes of the recipe that all sides share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class, variant_names
from loratune.config.composition import to_typed
from loratune.config.convert import flatten, to_plain
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.variant_settings import group_values, variant_settings
from loratune.config.schema import CompareConfig, RunConfig, TargetsConfig, TrainerConfig
from loratune.config.settings import missing_choice
from loratune.config.value_checks import check_values
from loratune.errors import ConfigError, choose_one, did_you_mean, raise_together

_LENGTH = ("steps", "epochs")
_TRAINER = (
    *_LENGTH, "batch_size", "grad_accum_steps", "lr", "lr_scale", "schedule", "warmup_steps",
    "warmup_ratio", "weight_decay", "betas", "eps", "clip_norm",
)  # fmt: skip
_RATES = ("lr", "lr_scale")
"""They only say where the search begins: a training's own rate is the adapter's."""
_SEARCH = ("steps", "lr_points", "lr_factor", "rungs")
_SECTIONS = ("adapter", "targets", "trainer", "compare")

Overrides = Mapping[str, Any]
"""``adapter: lora``, ``adapter.rank: 4``, ``targets: mlp``, ``trainer.batch_size: 16``."""


def contender_recipe(
    recipe: RunConfig, overrides: Overrides, where: str, folders: Sequence[Path] = ()
) -> RunConfig:
    """The recipe with a contender's changes.

    The recipe's own adapter stands for its variant as it is; another variant begins with the
    numbers of its own file.

    Args:
        recipe: what all contenders share.
        overrides: the contender's own settings.
        where: its place, for messages.
        folders: the user's recipe folders.

    Raises:
        ConfigError: for a setting that does not exist, that all contenders share, or that is out
            of range.
    """
    choices, values = _by_section(overrides, where)
    trainer, compare = _length(recipe, values)
    changed = replace(
        recipe,
        adapter=_adapter(recipe, choices.get("adapter"), values["adapter"], where, folders),
        targets=_targets(recipe, choices.get("targets"), values["targets"], where, folders),
        trainer=_typed(trainer, values["trainer"], "trainer", _TRAINER, where),
        compare=_typed(compare, values["compare"], "compare", _SEARCH, where),
    )
    before = {error.where for error in check_values(recipe)}
    raise_together(error for error in check_values(changed) if error.where not in before)
    return changed


def training_changes(recipe: RunConfig, common: RunConfig) -> dict[str, Any]:
    """Dotted settings outside the adapter by which a contender's training differs."""
    mine, theirs = flatten(_of_a_training(recipe)), flatten(_of_a_training(common))
    return {key: value for key, value in mine.items() if theirs.get(key, ...) != value}


def _of_a_training(recipe: RunConfig) -> dict[str, Any]:
    trainer = to_plain(recipe.trainer)
    return {
        "targets": to_plain(recipe.targets),
        "trainer": {key: trainer[key] for key in _TRAINER if key not in _RATES},
        "compare": {"steps": recipe.compare.steps},
    }


# -- reading the overrides -----------------------------------------------------------------


def _by_section(
    overrides: Overrides, where: str
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Chosen group files, and settings, of each section."""
    choices: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for key, value in overrides.items():
        section, _, name = str(key).partition(".")
        if section not in _SECTIONS:
            raise _not_its_own(str(key), where)
        if name:
            values[section][name] = value
        elif isinstance(value, Mapping):
            values[section] |= {str(inner): item for inner, item in value.items()}
        elif section in ("adapter", "targets"):
            choices[section] = str(value).strip()
        else:
            fix = f"change single values, for example {section}.KEY: VALUE"
            raise ConfigError(f"'{section}: {value}' has no effect", where=where, fix=fix)
    if "variant" in values["adapter"]:
        choices["adapter"] = str(values["adapter"].pop("variant")).strip()
    return choices, values


def _not_its_own(key: str, where: str) -> ConfigError:
    return ConfigError(
        f"a contender has no setting '{key}': base, rows and evaluation are the same for all",
        where=where,
        fix=choose_one(key.partition(".")[0], _SECTIONS),
    )


def _adapter(
    recipe: RunConfig,
    name: str | None,
    values: Mapping[str, Any],
    where: str,
    folders: Sequence[Path],
) -> AdapterConfig:
    own = recipe.adapter
    name = own.variant if name is None else name
    if name not in variant_names():
        fix = did_you_mean(name, variant_names()) or f"choose among {', '.join(variant_names())}"
        raise ConfigError(f"no adapter variant named '{name}'", where=where, fix=fix)
    start = own if name == own.variant else variant_settings(name, folders)
    allowed = [field.name for field in fields(config_class(name)) if field.name != "variant"]
    _check_known(values, allowed, name, where)
    adapter = to_typed(start, values, where)
    assert isinstance(adapter, AdapterConfig)
    return adapter


def _targets(
    recipe: RunConfig,
    name: str | None,
    values: Mapping[str, Any],
    where: str,
    folders: Sequence[Path],
) -> TargetsConfig:
    _check_known(values, [field.name for field in fields(TargetsConfig)], "targets", where)
    start = recipe.targets
    if name is not None:
        files = group_values("targets", name, folders)
        if not files:
            raise missing_choice("targets", name, _file_names("targets", folders))
        start = TargetsConfig()
        for path, of_file in files:
            start = to_typed(start, of_file, str(path))
    targets = to_typed(start, values, where)
    assert isinstance(targets, TargetsConfig)
    return targets


def _file_names(group: str, folders: Sequence[Path]) -> list[str]:
    places = (folder / group for folder in [*folders, builtin_recipes()])
    return sorted({path.stem for place in places for path in place.glob("*.yaml")})


def _length(
    recipe: RunConfig, values: Mapping[str, Mapping[str, Any]]
) -> tuple[TrainerConfig, CompareConfig]:
    """Trainer and search without the common length, where the contender has one of its own."""
    trainer, compare = recipe.trainer, recipe.compare
    if any(key in values["trainer"] for key in _LENGTH):
        return replace(trainer, steps=None, epochs=None), replace(compare, steps=None)
    return trainer, compare


def _typed(
    start: Any, values: Mapping[str, Any], section: str, allowed: Sequence[str], where: str
) -> Any:
    names = {field.name for field in fields(start)}
    common = [key for key in values if key in names and key not in allowed]
    if common:
        cause = f"'{section}.{common[0]}' is the same for all contenders"
        raise ConfigError(cause, where=where, fix="set it for the whole comparison")
    _check_known(values, allowed, section, where)
    return to_typed(start, values, where)


def _check_known(values: Mapping[str, Any], allowed: Sequence[str], owner: str, where: str) -> None:
    unknown = next((key for key in values if key not in allowed), None)
    if unknown is not None:
        fix = did_you_mean(unknown, allowed) or f"known here: {', '.join(sorted(allowed))}"
        raise ConfigError(f"{owner} has no setting '{unknown}'", where=where, fix=fix)
