"""The words of the command line, checked before Hydra acts on them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString, Sweep
from hydra.errors import HydraException

from loratune.adapters.registry import variant_names
from loratune.config.composition import translate_composition_error
from loratune.config.override_syntax import prepare_overrides
from loratune.config.recipes.folders import group_options, parse_flags, user_recipe_folders
from loratune.config.recipes.rules import (
    interpolation_problem,
    is_instantiation_key,
    leaves_folder,
    names_hydra,
)
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact_text
from loratune.config.settings import (
    GROUPS,
    Setting,
    find,
    known_keys,
    other_owners,
    unknown_key,
    wrong_type,
)
from loratune.errors import ConfigError, LoratuneError, SecurityError, did_you_mean

__all__ = ["check_overrides", "prepare_overrides", "translate_composition_error"]

MAX_WORD = 20_000
MAX_BRACKETS = 200


def check_overrides(arguments: Sequence[str], schema: type = RunConfig) -> list[LoratuneError]:
    """Every problem of a subcommand's words, in their order.

    ``hydra.*=`` and ``hydra/GROUP=`` are the user's own word and pass, except for ``_target_``.

    Args:
        arguments: the words after the subcommand, flags included.
        schema: the dataclass of the command's settings.

    """
    try:
        flags = parse_flags(arguments)
        folders = user_recipe_folders(arguments)
    except LoratuneError as error:
        return [error]
    errors: list[LoratuneError] = list(_check_flags(flags))
    if flags.shell_completion:  # its words (install=bash) are no settings
        return errors
    parsed = []
    for word in flags.overrides:
        try:
            parsed.append(_parse(word))
        except LoratuneError as error:
            errors.append(error)
    root = known_keys(schema, _chosen_variant(parsed))
    for override in parsed:
        errors += _check_override(override, root, folders)
    return errors


def _check_flags(flags: Namespace) -> Iterator[LoratuneError]:
    if flags.experimental_rerun is not None:
        cause = "a rerun file is a pickle: loading it runs code"
        fix = "repeat the run with its recipe.yaml"
        yield SecurityError(cause, where="--experimental-rerun", fix=fix)
    if flags.config_name is not None:
        cause = "every command starts from the package's own root"
        yield ConfigError(cause, where="--config-name", fix="choose with recipe=NAME")
    if flags.config_path is not None:
        fix = "use --config-dir DIR, which adds to them"
        yield ConfigError("the package's recipes are needed", where="--config-path", fix=fix)


def _parse(word: str) -> Override:
    """Hydra's reading of one word.

    Raises:
        ConfigError: if it is not ``key=value``.

    """
    shown = redact_text(word if len(word) <= 80 else f"{word[:77]}...")
    if len(word) > MAX_WORD or sum(map(word.count, "[{(")) > MAX_BRACKETS:
        raise ConfigError(f"'{shown}' is too long", where="command line", fix="write a recipe")
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"'{shown}' is not key=value", where="command line", fix=_hint(word))
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except (HydraException, RecursionError) as error:
        fix = "close every bracket and quote; quote text that has spaces, commas, colons or ="
        where = word.partition("=")[0].lstrip("+~")
        raise ConfigError(f"cannot read '{shown}'", where=where, fix=fix) from error


def _hint(word: str) -> str:
    for group in GROUPS:
        if word in group_options(group, []):
            return f"write {group}={word}"
    return "write key=value, for example trainer.steps=100"


def _chosen_variant(overrides: Sequence[Override]) -> str | None:
    """The variant that the words settle, if they settle one."""
    for override in overrides:
        if override.key_or_group == "adapter" and override.value() in variant_names():
            return str(override.value())
    return None


def _elements(value: Any) -> Iterator[Any]:
    """The single values of an override: one, or each of a sweep."""
    if isinstance(value, ChoiceSweep):
        for item in value.list:
            yield Override._convert_value(item)
    elif not isinstance(value, (Sweep, Glob)):
        yield value


def _check_override(
    override: Override, root: Setting, folders: Sequence[Path]
) -> Iterator[LoratuneError]:
    key = override.key_or_group
    whole = f"{key}@{override.package}" if override.package is not None else key
    values = list(_elements(override.value()))
    gadgets = [name for name in _words(whole, values) if is_instantiation_key(name)]
    if gadgets:
        fix = "settings are data: remove it"
        yield SecurityError(f"'{gadgets[0]}' would call a function", where=whole, fix=fix)
    elif override.is_hydra_override() or key == "hydra":
        if key == "hydra.searchpath":
            fix = "use --config-dir DIR, whose files are checked"
            yield ConfigError("more places for recipes are not taken", where=key, fix=fix)
    elif override.package is not None or names_hydra(key):
        error = SecurityError if names_hydra(whole) else ConfigError
        yield error(f"'{whole}' is not a setting", where=whole, fix="write group=name")
    elif key in GROUPS or "/" in key:
        yield from _check_choice(override, values, folders)
    else:
        yield from _check_setting(override, values, root)


def _words(key: str, values: Sequence[Any]) -> Iterator[str]:
    """Every name in a key and in the mappings of its values."""
    yield from key.replace("@", ".").replace("/", ".").split(".")
    for value in values:
        yield from _names(value)


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name.text if isinstance(name, QuotedString) else str(name)
            yield from _names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)


def _check_choice(
    override: Override, values: Sequence[Any], folders: Sequence[Path]
) -> Iterator[LoratuneError]:
    """``group=name``: there must be such a file."""
    group = override.key_or_group
    if group.partition("/")[0] not in GROUPS:
        fix = did_you_mean(group, GROUPS) or f"choose one of {', '.join(GROUPS)}"
        yield ConfigError(f"'{group}' is not a group", where=group, fix=fix)
        return
    options = group_options(group, folders)
    for value in values:
        if override.is_delete() or (value is None and group == "recipe"):
            continue
        if value is None:
            fix = f"choose one of {', '.join(options)}"
            yield ConfigError(f"{group} cannot be left out", where=group, fix=fix)
            continue
        if isinstance(value, dict):
            fix = f"choose by name, then set single values: {group}.KEY=VALUE"
            yield ConfigError(f"{group} is chosen by name", where=group, fix=fix)
            continue
        for name in value if isinstance(value, list) else [value]:
            if leaves_folder(str(name)) or str(name).startswith((".", "/")):
                yield SecurityError(f"'{name}' leaves the recipe folders", where=group)
            elif str(name).removesuffix(".yaml") not in options:
                yield missing_choice(group, str(name), options)


def missing_choice(group: str, name: str, options: Sequence[str]) -> ConfigError:
    """The error for a choice that does not exist."""
    listing = f"available: {', '.join(options)}"
    fix = f"{did_you_mean(name, options)} {listing}".strip()
    return ConfigError(f"no {group} named '{name}'", where=f"{group}={name}", fix=fix)


def _check_setting(
    override: Override, values: Sequence[Any], root: Setting
) -> Iterator[LoratuneError]:
    key = override.key_or_group
    path = tuple(key.split("."))
    setting = find(root, path)
    if setting is None:
        owners = other_owners(path)
        if owners:
            cause = f"'{key}' has no effect with this adapter"
            yield ConfigError(cause, where=key, fix=f"it belongs to {', '.join(owners)}")
        else:
            yield unknown_key(root, path)
        return
    if override.is_delete():
        yield ConfigError(f"'{key}' cannot be deleted", where=key, fix=f"set {key}=null")
        return
    for value in values:
        yield from _check_value(key, setting, value)


def _check_value(key: str, setting: Setting, value: Any) -> Iterator[LoratuneError]:
    texts = list(_texts(value))
    problems = [problem for text in texts if (problem := interpolation_problem(text))]
    if problems:
        yield SecurityError(problems[0], where=key, fix="write the value itself")
    elif setting.children and isinstance(value, dict):
        for name, item in value.items():
            child = setting.child(str(name))
            if child is None:
                yield unknown_key(Setting(None, {key: setting}), (key, str(name)))
            else:
                yield from _check_value(f"{key}.{name}", child, item)
    elif not any("${" in text for text in texts) and (allowed := wrong_type(setting, value)):
        shown = redact_text(f"{key}={value}").partition("=")[2]
        yield ConfigError(f"{key} must be {allowed}, got '{shown}'", where=key)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
