"""The words of the command line, checked before Hydra acts on them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString, Sweep

from loratune.adapters.registry import variant_names
from loratune.config.command_line import CommandLine, is_for_hydra
from loratune.config.mixture import SOURCES, missing_sources, source_problems
from loratune.config.recipes.folders import group_options
from loratune.config.recipes.rules import (
    interpolation_problem,
    is_instantiation_key,
    leaves_folder,
    names_hydra,
    strings_in,
)
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact_text
from loratune.config.settings import (
    GROUPS,
    Setting,
    find,
    has_no_effect,
    known_keys,
    missing_choice,
    unknown_group,
    unknown_key,
    wrong_type,
)
from loratune.errors import ConfigError, LoratuneError, SecurityError, unknown_setting


def check_overrides(command_line: CommandLine, schema: type = RunConfig) -> list[LoratuneError]:
    """Every problem of a subcommand's words, in their order.

    ``hydra.*=`` and ``hydra/GROUP=`` are the user's own word and pass, except for ``_target_``.

    Args:
        command_line: the words after the subcommand.
        schema: the dataclass of the command's settings.
    """
    errors: list[LoratuneError] = list(_check_flags(command_line.flags))
    if command_line.flags.shell_completion:  # its words (install=bash) are not settings
        return errors
    errors += command_line.problems
    root = known_keys(schema, _chosen_variant(command_line.overrides))
    for override in command_line.overrides:
        errors += _check_override(override, root, command_line.folders)
    return errors


def _check_flags(flags: Namespace) -> Iterator[LoratuneError]:
    if flags.experimental_rerun is not None:
        cause = "a rerun file is a pickle: loading it runs code"
        fix = "repeat the run with its recipe.yaml"
        yield SecurityError(cause, where="--experimental-rerun", fix=fix)
    if flags.config_name is not None:
        cause = "every command starts from the package's own config"
        yield ConfigError(cause, where="--config-name", fix="choose with recipe=NAME")
    if flags.config_path is not None:
        cause = "the package's own recipes cannot be replaced"
        fix = "use --config-dir DIR, which adds to them"
        yield ConfigError(cause, where="--config-path", fix=fix)


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
    full_key = f"{key}@{override.package}" if override.package is not None else key
    values = list(_elements(override.value()))
    callers = [name for name in _names_in(full_key, values) if is_instantiation_key(name)]
    if callers:
        fix = "settings are data: remove it"
        yield SecurityError(f"'{callers[0]}' would call a function", where=full_key, fix=fix)
    elif is_for_hydra(override):
        if key == "hydra.searchpath":
            fix = "use --config-dir DIR, whose files are checked"
            yield ConfigError("recipes are not searched for in more places", where=key, fix=fix)
    elif override.package is not None or names_hydra(key):
        error = SecurityError if names_hydra(full_key) else ConfigError
        what = "reaches Hydra's own settings" if names_hydra(full_key) else "has a package"
        yield error(f"'{full_key}' {what}", where=full_key, fix="write group=name")
    elif key in GROUPS or "/" in key:
        yield from _check_choice(override, values, folders)
    else:
        yield from _check_setting(override, values, root)


def _names_in(key: str, values: Sequence[Any]) -> Iterator[str]:
    """Every name in a key and in the mappings of its values."""
    yield from key.replace("@", ".").replace("/", ".").split(".")
    for value in values:
        yield from _keys_in(value)


def _keys_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name.text if isinstance(name, QuotedString) else str(name)
            yield from _keys_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys_in(item)


def _check_choice(
    override: Override, values: Sequence[Any], folders: Sequence[Path]
) -> Iterator[LoratuneError]:
    """``group=name``: there must be such a file."""
    group = override.key_or_group
    if group.partition("/")[0] not in GROUPS:
        yield unknown_group(group)
        return
    options = group_options(group, folders)
    for value in values:
        if override.is_delete() or (value is None and group == "recipe"):
            continue
        if value is None:
            fix = f"choose one of {', '.join(options)}"
            yield ConfigError(f"{group} cannot be left out", where=group, fix=fix)
        elif isinstance(value, dict):
            fix = f"choose by name, then set single values: {group}.KEY=VALUE"
            yield ConfigError(f"{group} is chosen by name", where=group, fix=fix)
        else:
            for name in map(str, value if isinstance(value, list) else [value]):
                if leaves_folder(name) or name.startswith((".", "/")):
                    yield SecurityError(f"'{name}' leaves the recipe folders", where=group)
                elif name.removesuffix(".yaml") not in options:
                    yield missing_choice(group, name, options)


def _check_setting(
    override: Override, values: Sequence[Any], root: Setting
) -> Iterator[LoratuneError]:
    key = override.key_or_group
    path = tuple(key.split("."))
    setting = find(root, path)
    if setting is None:
        yield has_no_effect(path) or unknown_key(root, path)
        return
    if override.is_delete():
        yield ConfigError(f"'{key}' cannot be deleted", where=key, fix=f"set {key}=null")
        return
    for value in values:
        yield from _check_value(key, setting, value)


def _check_value(key: str, setting: Setting, value: Any) -> Iterator[LoratuneError]:
    strings = list(strings_in(value))
    problems = [problem for text in strings if (problem := interpolation_problem(text))]
    if problems:
        yield SecurityError(problems[0], where=key, fix="write the value itself")
    elif setting.children and isinstance(value, dict):
        for name, item in value.items():
            child = setting.child(str(name))
            if child is None:
                yield unknown_setting(f"{key}.{name}", setting.children)
            else:
                yield from _check_value(f"{key}.{name}", child, item)
    elif setting.item is not None and isinstance(value, list):
        yield from _check_items(key, setting.item, value)
    elif not any("${" in text for text in strings) and (allowed := wrong_type(setting, value)):
        shown = redact_text(f"{key}={value}").partition("=")[2]
        yield ConfigError(f"{key} must be {allowed}, got '{shown}'", where=key)


def _check_items(key: str, item: Setting, values: Sequence[Any]) -> Iterator[LoratuneError]:
    """The elements of a list of mappings, and what they must not be together."""
    mappings = []
    for number, value in enumerate(values):
        place = f"{key}[{number}]"
        if not isinstance(value, dict):
            cause = f"{place} must be a mapping of settings, got '{redact_text(str(value))}'"
            yield ConfigError(cause, where=place, fix=f"write {key}=[{{path: FILE}}, ...]")
            continue
        mappings.append({str(name): one for name, one in value.items()})
        yield from _check_value(key=place, setting=item, value=mappings[-1])
    if key == SOURCES and len(mappings) == len(values):
        yield from source_problems(mappings)
        yield from missing_sources(mappings)
