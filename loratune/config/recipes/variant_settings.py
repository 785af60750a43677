"""The values that recipe files give one group, such as a variant's own ``adapter/NAME.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class
from loratune.config.composition import to_typed
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.yaml_reader import parse, plain, read_text
from loratune.errors import ConfigError

_DEEPEST = 10


def variant_settings(name: str, folders: Sequence[Path] = ()) -> AdapterConfig:
    """A variant as ``adapter=NAME`` composes it, without composing everything else.

    The object is shared between calls: change a copy.

    Args:
        name: of the variant.
        folders: the user's recipe folders, the first one wins; the package's come last.

    Raises:
        ConfigError: if there is no such variant, or its file does not fit it.
    """
    return _settings(name, tuple(folders))


@cache
def _settings(name: str, folders: tuple[Path, ...]) -> AdapterConfig:
    values: dict[str, Any] = {}
    for _, of_file in group_values("adapter", name, folders):
        values |= of_file
    config = to_typed(config_class(name), values, f"adapter/{name}.yaml")
    assert isinstance(config, AdapterConfig)
    return config


def recipe_file(group: str, name: str, folders: Sequence[Path] = ()) -> Path | None:
    """The file that ``group=name`` chooses, or ``None``."""
    for folder in [*folders, builtin_recipes()]:
        path = folder / group / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def group_values(
    group: str, name: str, folders: Sequence[Path] = (), depth: int = 0
) -> list[tuple[Path, dict[str, Any]]]:
    """The file that ``group=name`` chooses, and those of the group that its defaults name.

    Each with its values, in the order in which Hydra merges them; no file, if there is none.

    Raises:
        ConfigError: if the files name each other in a circle.
    """
    path = recipe_file(group, name, folders)
    if path is None:
        return []
    if depth > _DEEPEST:
        raise ConfigError("the defaults go in circles", where=str(path), fix="remove one")
    node = parse(read_text(path, str(path)), str(path))
    values = plain(node) if node is not None else {}
    defaults = values.pop("defaults", [])
    merged: list[tuple[Path, dict[str, Any]]] = []
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if entry == "_self_":
            merged.append((path, values))
        elif isinstance(entry, str) and not entry.startswith("/"):
            merged += group_values(group, entry.partition("@")[0], folders, depth + 1)
    return merged
