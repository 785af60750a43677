"""From Hydra's composed config, or a run's recipe file, to typed configuration objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from yaml.nodes import MappingNode, Node, SequenceNode

from loratune.adapters.registry import config_class, variant_names
from loratune.config.composition import to_typed
from loratune.config.recipes.yaml_reader import parse, read_text, scalar_text
from loratune.config.recipes.yaml_reader import plain as plain_values
from loratune.config.schema import RunConfig
from loratune.config.settings import Setting, is_text, known_keys
from loratune.config.value_checks import check_values
from loratune.errors import ConfigError, raise_together

ConfigType = TypeVar("ConfigType", bound=RunConfig)


def register_schemas(command_config: type[RunConfig]) -> None:
    """Tell Hydra the types: the command's config as ``schema``, each variant's under its name."""
    store = ConfigStore.instance()
    store.store(name="schema", node=command_config)
    for name in variant_names():
        store.store(group="schema/adapter", name=name, node=config_class(name))


def to_run_config(composed: DictConfig, config_type: type[ConfigType]) -> ConfigType:
    """Check a composed config against the dataclasses and return them.

    Merging the plain values onto a fresh schema refuses keys that ``+key=value`` smuggled in,
    which ``OmegaConf.to_object`` alone would drop without a word.

    Raises:
        LoratuneError: every unknown key, wrong type, and value out of range.
    """
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return from_plain({str(key): value for key, value in values.items()}, config_type)


def from_plain(values: dict[str, Any], config_type: type[ConfigType]) -> ConfigType:
    """Typed configuration from nested plain values (see ``to_run_config``)."""
    adapter = values.get("adapter")
    if not isinstance(adapter, dict) or not adapter.get("variant"):
        raise ConfigError("no adapter is chosen", where="adapter", fix="set adapter=lora")
    adapter_config = config_class(str(adapter["variant"]))
    config = to_typed(config_type(adapter=adapter_config()), values)
    assert isinstance(config, config_type)
    raise_together(check_values(config))
    return config


def apply_overrides(values: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """Apply the settings of the command line to a run's recorded recipe.

    Raises:
        ConfigError: for a word that chooses a group: a finished run's parts are fixed.
    """
    config = OmegaConf.create(values)
    for override in overrides:
        key = override.key_or_group
        if override.is_delete() or not override.input_line:
            raise ConfigError("a run's settings cannot be deleted", where=key)
        current = OmegaConf.select(config, key, default=None)
        if "/" in key or (isinstance(current, DictConfig) and "." not in key):
            raise ConfigError(
                f"'{key}' is fixed for a finished run",
                where=str(override.input_line),
                fix=f"override single values, for example {key}.KEY=VALUE",
            )
        OmegaConf.update(config, key, override.value(), merge=True)
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def to_plain(config: Any) -> dict[str, Any]:
    """Nested plain values of a typed configuration, enums as their names."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    result = plain(config)
    assert isinstance(result, dict)
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of everything that is not a mapping, or an empty one."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_recipe(path: Path) -> dict[str, Any]:
    """Nested plain values of a run's ``recipe.yaml``; nothing in it is interpolated or run.

    Where a setting is text, the word counts as it is written (``name: 1e3``).

    Raises:
        ConfigError: if it cannot be read, or is not a mapping.
    """
    node = parse(read_text(path, str(path)), str(path))
    values = None if node is None else _settings(node, known_keys(RunConfig))
    if not isinstance(values, dict):
        raise ConfigError("the recipe is not a mapping", where=str(path))
    return {str(key): value for key, value in values.items()}


def _settings(node: Node, setting: Setting | None) -> Any:
    """The node's value, with the words of text settings as they are written."""
    if isinstance(node, MappingNode) and setting is not None and setting.children:
        return {
            (name := str(plain_values(key))): _settings(value, setting.child(name))
            for key, value in node.value
        }
    return _words(node) if setting is not None and is_text(setting) else plain_values(node)


def _words(node: Node) -> Any:
    if isinstance(node, MappingNode):
        return {str(plain_values(key)): _words(value) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_words(item) for item in node.value]
    return None if plain_values(node) is None else scalar_text(node)


def run_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Only the keys that belong to ``RunConfig`` (a command's own keys are not recorded)."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    return {key: value for key, value in values.items() if key in names}
