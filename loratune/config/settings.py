"""The settings of a recipe as a tree of names and types, read off the dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError, choose_one, did_you_mean, unknown_setting

GROUPS = ("adapter", "data", "model", "recipe", "targets", "trainer")
"""Folders whose files are chosen by ``group=name``."""


@dataclass(frozen=True)
class Setting:
    """One key: its type, and the keys below it.

    ``children`` is empty for a plain value; ``free`` marks a mapping whose keys are the user's own;
    ``item`` has the keys of each element of a list of mappings.
    """

    annotation: Any
    children: Mapping[str, Setting] = field(default_factory=dict)
    free: bool = False
    item: Setting | None = None

    def child(self, name: str) -> Setting | None:
        """The setting called ``name`` below this one, or ``None``."""
        return _ANYTHING if self.free else self.children.get(name)


_ANYTHING = Setting(Any, free=True)


@cache
def known_keys(schema: type = RunConfig, variant: str | None = None) -> Setting:
    """Every key of ``schema``; ``adapter`` has the keys of ``variant``, or of all variants."""
    names = (variant,) if variant else variant_names()
    return Setting(schema, _children(schema, names))


def _children(schema: type, variants: Sequence[str]) -> dict[str, Setting]:
    hints = typing.get_type_hints(schema)
    return {item.name: _setting(hints[item.name], variants) for item in dataclasses.fields(schema)}


def _setting(annotation: Any, variants: Sequence[str]) -> Setting:
    if annotation is AdapterConfig:
        merged: dict[str, Setting] = {}
        for name in variants:
            merged |= _children(config_class(name), variants)
        return Setting(annotation, merged)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return Setting(annotation, _children(annotation, variants))
    inner = _without_none(annotation)
    if item := listed_dataclass(annotation):
        return Setting(annotation, item=Setting(item, _children(item, variants)))
    return Setting(annotation, free=typing.get_origin(inner) is dict)


def listed_dataclass(annotation: Any) -> type | None:
    """The dataclass that the elements of a list are, if they are."""
    inner = _without_none(annotation)
    if typing.get_origin(inner) is not list:
        return None
    [item] = typing.get_args(inner)
    return item if isinstance(item, type) and dataclasses.is_dataclass(item) else None


def find(root: Setting, path: Sequence[str]) -> Setting | None:
    """The setting at ``path``, or ``None`` if there is none; ``name[0]`` is a list's element."""
    here: Setting | None = root
    for name in path:
        plain, bracket, _ = name.partition("[")
        here = here.child(plain) if here is not None else None
        if bracket and here is not None and here.item is not None:
            here = here.item
    return here


def leaves(root: Setting, prefix: str = "") -> Iterator[str]:
    """Dotted names of every setting, groups included."""
    for name, child in root.children.items():
        yield f"{prefix}{name}"
        yield from leaves(child, f"{prefix}{name}.")


def unknown_key(root: Setting, path: Sequence[str], where: str = "") -> ConfigError:
    """The error for a ``path`` that is not a setting, with what it may have meant."""
    depths = range(1, len(path) + 1)
    depth = next((i for i in depths if find(root, path[:i]) is None), len(path))
    parent = find(root, path[: depth - 1]) or root
    below = ".".join(path[: depth - 1])
    hint = _elsewhere(root, path[-1]) or ("" if parent.children else f"{below} is one value")
    return unknown_setting(".".join(path[:depth]), parent.children, where=where, hint=hint)


def has_no_effect(path: Sequence[str], where: str = "") -> ConfigError | None:
    """The error for a setting of other variants (``adapter.lr_ratio``), if it is one."""
    owners = [name for name in variant_names() if find(known_keys(RunConfig, name), path)]
    if not owners:
        return None
    key = ".".join(path)
    cause = f"'{key}' has no effect with the chosen adapter"
    return ConfigError(cause, where=where or key, fix=f"it belongs to {', '.join(owners)}")


def unknown_group(group: str, where: str = "") -> ConfigError:
    """The error for a ``group=name`` whose group does not exist."""
    fix = choose_one(group, GROUPS)
    return ConfigError(f"'{group}' is not a group", where=where or group, fix=fix)


_LAUNCHERS = {"submitit": "slurm", "ray": "ray"}
"""Launchers of Hydra's that an extra of the package brings, by the first part of their name."""


def missing_choice(group: str, name: str, options: Sequence[str]) -> ConfigError:
    """The error for a ``group=name`` that does not exist."""
    fix = f"{did_you_mean(name, options)} available: {', '.join(options) or 'none'}".strip()
    if group == "hydra/launcher":
        extra = _LAUNCHERS.get(name.partition("_")[0])
        package = f"loratune[{extra}]" if extra else f"hydra-{name}-launcher"
        fix = f"if it is a launcher: pip install '{package}'; {fix}"
    return ConfigError(f"no {group} named '{name}'", where=f"{group}={name}", fix=fix)


def _elsewhere(root: Setting, word: str) -> str:
    """A hint for a word that is a setting in another place: ``lr`` is ``trainer.lr``."""
    by_last: dict[str, list[str]] = {}
    for name in leaves(root):
        by_last.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    close = difflib.get_close_matches(word, by_last, n=1, cutoff=0.8)
    return f"did you mean '{by_last[close[0]][-1]}'?" if close else ""


def wrong_type(setting: Setting, value: Any) -> str:
    """What ``setting`` allows, if ``value`` cannot be converted to it; else an empty string.

    The conversion is OmegaConf's own, so this refuses what composing would refuse, and the casts
    that OmegaConf makes without a word: text to a number, true or false to text or a number.
    """
    if setting.children:
        return "" if isinstance(value, Mapping) else "a mapping of settings"
    if setting.annotation is Any or value == "???":
        return ""
    if setting.item is not None:
        mappings = isinstance(value, list) and all(isinstance(one, Mapping) for one in value)
        return "" if value is None or mappings else describe(setting.annotation)
    if _is_cast(setting.annotation, value):
        return describe(setting.annotation)
    probe = OmegaConf.structured(_one_field(setting.annotation))
    try:
        probe.value = value
    except OmegaConfBaseException:
        return describe(setting.annotation)
    return ""


def _is_cast(annotation: Any, value: Any) -> bool:
    inner = _without_none(annotation)
    origin, parts = typing.get_origin(inner), typing.get_args(inner)
    if origin is list and isinstance(value, (list, tuple)):
        return any(_is_cast(parts[0], item) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return any(_is_cast(parts[1], item) for item in value.values())
    if inner in (int, float):
        return isinstance(value, (str, bool)) and value != "???"
    return inner is str and isinstance(value, bool)


def is_text(setting: Setting) -> bool:
    """Whether a setting is text, or a list or mapping of nothing but text."""
    return _without_none(setting.annotation) in (str, list[str], dict[str, str])


@cache
def _one_field(annotation: Any) -> type:
    return make_dataclass("OneField", [("value", annotation)])


def _without_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        others = [item for item in typing.get_args(annotation) if item is not type(None)]
        return others[0] if len(others) == 1 else annotation
    return annotation


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def describe(annotation: Any) -> str:
    """A type in words: ``a whole number or null``."""
    inner = _without_none(annotation)
    if inner is not annotation:
        return f"{describe(inner)} or null"
    if isinstance(inner, type) and issubclass(inner, Enum):
        return f"one of {', '.join(str(item.value) for item in inner)}"
    origin, parts = typing.get_origin(inner), typing.get_args(inner)
    if listed_dataclass(inner):
        return "a list of mappings, [{...}, {...}]"
    if origin is list:
        return f"a list, each {describe(parts[0])}"
    if origin is dict:
        return "a mapping" if parts[1] is Any else f"a mapping, each value {describe(parts[1])}"
    return _WORDS.get(inner, "a value")
