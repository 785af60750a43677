"""What Hydra and OmegaConf raise while they compose, in one line that names key and file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from loratune.config.secrets import redact_text
from loratune.config.settings import GROUPS, has_no_effect, missing_choice, unknown_group
from loratune.errors import ConfigError, LoratuneError, unknown_setting

_PLUS_ADVICE = re.compile(r"^(To append to your config|Either remove|Or add|See https?:).*$", re.M)
_IN_CONFIG = re.compile(r"In '([\w./+-]+)'")


def check_composed(config: DictConfig) -> list[ConfigError]:
    """Every mandatory value that is not set and every reference that leads nowhere, at once."""
    errors = []
    for key, node in _nodes(config, ""):
        text = str(node._value())
        if node._is_missing():
            errors.append(ConfigError(f"'{key}' must be set", where=key, fix=f"add {key}=VALUE"))
        elif node._is_interpolation() and (cause := _unresolved(node, text)):
            errors.append(ConfigError(cause, where=key, fix="write the value itself"))
    return errors


def _nodes(container: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Name and node of every value below ``container``, Hydra's own left out."""
    listed = isinstance(container, ListConfig)
    for key in range(len(container)) if listed else list(container):
        node = container._get_node(key)
        name = f"{prefix}[{key}]" if listed else f"{prefix}.{key}".lstrip(".")
        if name == "hydra" or node is None:
            continue
        is_leaf = node._is_none() or node._is_missing() or node._is_interpolation()
        if isinstance(node, (DictConfig, ListConfig)) and not is_leaf:
            yield from _nodes(node, name)
        else:
            yield name, node


def _unresolved(node: Any, text: str) -> str:
    """Why a reference cannot be followed; one to a missing value is reported at that value."""
    try:
        node._dereference_node()
    except InterpolationToMissingValueError:
        return ""
    except InterpolationKeyError:
        return f"'{text}' refers to a setting that does not exist"
    except (OmegaConfBaseException, RecursionError):
        return f"'{text}' cannot be resolved"
    return ""


def to_typed(schema: Any, values: Mapping[str, Any], place: str = "") -> Any:
    """Plain ``values`` over a dataclass (or an object of one), as an object of it.

    Args:
        schema: the dataclass.
        values: nested plain values.
        place: a file or key, for messages.

    Raises:
        LoratuneError: for an unknown key, a wrong type, and whatever the dataclass itself raises.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        raise translate_composition_error(error, place) from error


def translate_composition_error(error: BaseException, place: str = "") -> LoratuneError:
    """One ``ConfigError`` for whatever composing raised; a ``LoratuneError`` stays as it is."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, LoratuneError):
            return link
    place = place or _place(chain)
    for link in chain:
        if isinstance(link, MissingConfigException):
            return _missing_config(link)
        if isinstance(link, OmegaConfBaseException):
            return _omegaconf_error(link, place)
    cause = next((link for link in chain if str(link) not in ("", "None")), error)
    return ConfigError(_first_line(cause), where=place, fix=_fix_of(cause))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _place(chain: list[BaseException]) -> str:
    """The recipe file that Hydra was merging, if its message says so."""
    for link in chain:
        if isinstance(link, HydraException) and (match := _IN_CONFIG.search(str(link))):
            return f"{match[1]}.yaml"
    return ""


def _missing_config(error: MissingConfigException) -> ConfigError:
    name = str(error.missing_cfg_file or "")
    group, _, choice = name.rpartition("/")
    options = [str(option) for option in error.options or ()]
    if not group:
        return ConfigError(f"no recipe file '{name}.yaml'", where=name, fix="see --info searchpath")
    if not options and group.partition("/")[0] not in GROUPS:
        return unknown_group(group, where=name)
    return missing_choice(group, choice, options)


def _omegaconf_error(error: OmegaConfBaseException, place: str) -> ConfigError:
    key = str(error.full_key or error.key or "")
    where = "; ".join(part for part in (place, key) if part)
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return _unknown(error, key, where)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"'{key}' must be set", where=where, fix=f"add {key}=VALUE")
    if isinstance(error, InterpolationResolutionError):
        return ConfigError(_first_line(error), where=where, fix="write the value itself")
    if isinstance(error, ValidationError):
        cause = f"{key}: {_first_line(error)}".removeprefix(": ")
        return ConfigError(cause, where=where, fix="fix the value")
    return ConfigError(_first_line(error), where=where, fix=_fix_of(error))


def _unknown(error: OmegaConfBaseException, key: str, where: str) -> ConfigError:
    parent = error.parent_node
    names = {str(name) for name in parent} if isinstance(parent, DictConfig) else set()
    return has_no_effect(key.split("."), where) or unknown_setting(
        key, names - {"hydra"}, where=where
    )


def _first_line(error: BaseException) -> str:
    """The message without Hydra's advice on ``+`` and without the lines of its own bookkeeping."""
    text = _PLUS_ADVICE.sub("", str(error)) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    first = lines[0] if lines else type(error).__name__
    if first.startswith("Ambiguous value for argument"):
        return f"{first}: a list is key=[a,b], text with a comma is key='\"a,b\"', a sweep needs -m"
    return redact_text(first)


def _fix_of(error: BaseException) -> str:
    if "requires --multirun" in str(error) or "Ambiguous value" in str(error):
        return "to run one job for each value, add -m"
    return "see --cfg job and --info defaults"
