"""The adapter variants that exist: one folder each, found by looking.

A folder ``loratune/adapters/NAME`` with ``config.py`` and ``module.py`` is a variant.  Nothing
else lists, enumerates or branches on the names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loratune.adapters.config import AdapterConfig
from loratune.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from loratune.adapters.base import Adapter

_CONFIGS: dict[str, type[AdapterConfig]] = {}
_ADAPTERS: dict[str, type[Adapter]] = {}
_ConfigType = TypeVar("_ConfigType", bound=type[AdapterConfig])
_AdapterType = TypeVar("_AdapterType", bound="type[Adapter]")


@cache
def variant_names() -> tuple[str, ...]:
    """Names of all variants, sorted."""
    folder = Path(__file__).parent
    return tuple(sorted(path.parent.name for path in folder.glob("*/config.py")))


def register_config(name: str) -> Callable[[_ConfigType], _ConfigType]:
    """Class decorator: this dataclass configures the variant ``name``."""

    def add(cls: _ConfigType) -> _ConfigType:
        _CONFIGS[name] = cls
        return cls

    return add


def register_adapter(name: str) -> Callable[[_AdapterType], _AdapterType]:
    """Class decorator: this module is the layer of the variant ``name``."""

    def add(cls: _AdapterType) -> _AdapterType:
        _ADAPTERS[name] = cls
        return cls

    return add


def config_class(name: str) -> type[AdapterConfig]:
    """The configuration dataclass of a variant; imports no torch.

    Raises:
        ConfigError: if there is no such variant.
    """
    _check_name(name)
    import_module(f"loratune.adapters.{name}.config")
    return _CONFIGS[name]


def adapter_class(name: str) -> type[Adapter]:
    """The layer class of a variant; imports torch.

    Raises:
        ConfigError: if there is no such variant.
    """
    _check_name(name)
    import_module(f"loratune.adapters.{name}.module")
    return _ADAPTERS[name]


def _check_name(name: str) -> None:
    if name not in variant_names():
        raise ConfigError(
            f"no adapter variant named '{name}'",
            where="adapter",
            fix=did_you_mean(name, variant_names())
            or f"choose one of {', '.join(variant_names())}",
        )
