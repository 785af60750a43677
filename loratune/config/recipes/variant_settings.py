"""The numbers that a variant's own recipe, ``adapter/NAME.yaml``, gives it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import config_class
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.yaml_reader import parse, plain, read_text
from loratune.errors import ConfigError, LoratuneError

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
    cls = config_class(name)
    values = _file_values(name, folders, 0)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except LoratuneError:
        raise
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, LoratuneError):
            raise error.__cause__ from None
        line = str(error).partition("\n")[0]
        raise ConfigError(line, where=f"adapter/{name}.yaml", fix="mend the value") from error
    assert isinstance(config, cls)
    return config


def recipe_file(group: str, name: str, folders: Sequence[Path] = ()) -> Path | None:
    """The file that ``group=name`` chooses, or ``None``."""
    for folder in [*folders, builtin_recipes()]:
        path = folder / group / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def _file_values(name: str, folders: Sequence[Path], depth: int) -> dict[str, Any]:
    """The values of ``adapter/NAME.yaml`` over those of the files that its defaults name."""
    path = recipe_file("adapter", name, folders)
    if path is None:
        return {}
    if depth > _DEEPEST:
        raise ConfigError("the defaults go in circles", where=str(path), fix="remove one")
    node = parse(read_text(path, str(path)), str(path))
    values = plain(node) if node is not None else {}
    merged: dict[str, Any] = {}
    for entry in [*values.pop("defaults", []), "_self_"]:
        if entry == "_self_":
            merged |= values
        elif isinstance(entry, str) and not entry.startswith("/"):
            merged |= _file_values(entry.partition("@")[0], folders, depth + 1)
    return merged
