"""The adapter variants that exist: one folder each, found by looking.

A folder ``loratune/adapters/NAME`` is a variant: the dataclass in its ``config.py`` whose
``variant`` is NAME, and the layer that its ``module.py`` defines.  Nothing else lists, enumerates
or branches on the names.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from loratune.adapters.config import AdapterConfig
from loratune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from loratune.adapters.base import Adapter


@cache
def variant_names() -> tuple[str, ...]:
    """Names of all variants, sorted."""
    folders = import_module("loratune.adapters").__path__
    configs = (path for folder in folders for path in Path(folder).glob("*/config.py"))
    return tuple(sorted(path.parent.name for path in configs))


def config_class(name: str) -> type[AdapterConfig]:
    """The configuration dataclass of a variant; imports no torch.

    Raises:
        ConfigError: if there is no such variant.
    """
    module = _imported(name, "config")
    return next(
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, AdapterConfig) and cls.variant == name
    )


def adapter_class(name: str) -> type[Adapter]:
    """The layer class of a variant; imports torch.

    Raises:
        ConfigError: if there is no such variant.
    """
    from loratune.adapters.base import Adapter

    module = _imported(name, "module")
    return next(
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Adapter) and cls.__module__ == module.__name__
    )


def _imported(name: str, part: str) -> ModuleType:
    if name not in variant_names():
        raise ConfigError(
            f"no adapter variant named '{name}'",
            where="adapter",
            fix=did_you_mean(name, variant_names())
            or f"choose one of {', '.join(variant_names())}",
        )
    return import_module(f"loratune.adapters.{name}.{part}")
