"""Which file, or the command line, each value of a composed recipe came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.config.convert import flatten, run_fields, to_plain
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.variant_settings import group_values
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.config.settings import GROUPS

COMMAND_LINE = "command line"
DEFAULT = "default"
_ORDER = ("model", "targets", "adapter", "data", "trainer", "recipe")


@dataclass(frozen=True)
class SourcedValue:
    """One setting: dotted key, value, and where it was set."""

    key: str
    value: Any
    source: str


def sourced_values(
    config: RunConfig,
    keys_set: Set[str],
    choices: Mapping[str, str | None],
    folders: Sequence[Path] = (),
) -> list[SourcedValue]:
    """Every setting of the recipe with its source.

    Args:
        config: as composed.
        keys_set: keys that the command line sets.
        choices: group to the file chosen in it.
        folders: the user's recipe folders.
    """
    files = [
        (path, flatten(values, "" if group == "recipe" else f"{group}."))
        for group in _ORDER
        for path, values in group_values(group, choices.get(group) or "", folders)
    ]
    settings = flatten(redact(run_fields(to_plain(config))))
    return [
        SourcedValue(key, value, _source(key, keys_set, files)) for key, value in settings.items()
    ]


def _source(key: str, keys_set: Set[str], files: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    parts = key.split(".")
    names = [".".join(parts[: end + 1]) for end in range(len(parts))]
    # `adapter=vera` chooses a file, whose values are the file's; `name=x` is a value.
    if any(name in keys_set and name not in GROUPS for name in names):
        return COMMAND_LINE
    for path, values in reversed(files):
        if any(name in values for name in names):
            return _shown(path)
    return DEFAULT


def _shown(path: Path) -> str:
    """A file as one would open it, the package's own by their place in the recipes."""
    root = builtin_recipes()
    return path.relative_to(root).as_posix() if root in path.parents else str(path)
