"""What Hydra and OmegaConf raise while they compose, in one line that names key and file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig
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
from loratune.config.settings import GROUPS, other_owners
from loratune.errors import ConfigError, LoratuneError, did_you_mean

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
        whole = node._is_none() or node._is_missing() or node._is_interpolation()
        if isinstance(node, (DictConfig, ListConfig)) and not whole:
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
        return f"'{text}' refers to no setting"
    except (OmegaConfBaseException, RecursionError):
        return f"'{text}' cannot be resolved"
    return ""


def translate_composition_error(error: BaseException) -> LoratuneError:
    """One ``ConfigError`` for whatever composing raised; a ``LoratuneError`` is kept as it is."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, LoratuneError):
            return link
    place = _place(chain)
    for link in chain:
        if isinstance(link, MissingConfigException):
            return _missing_config(link)
        if isinstance(link, OmegaConfBaseException):
            return _omegaconf_error(link, place)
    told = next((link for link in chain if str(link) not in ("", "None")), error)
    return ConfigError(_first_line(told), where=place, fix=_fix_of(told))


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
        fix = did_you_mean(group, GROUPS) or f"groups: {', '.join(GROUPS)}"
        return ConfigError(f"'{group}' is not a group", where=name, fix=fix)
    fix = f"{did_you_mean(choice, options)} available: {', '.join(options) or 'none'}".strip()
    return ConfigError(f"no {group} named '{choice}'", where=f"{group}={choice}", fix=fix)


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
        return ConfigError(f"{key}: {_first_line(error)}", where=where, fix="mend the value")
    return ConfigError(_first_line(error), where=where, fix=_fix_of(error))


def _unknown(error: OmegaConfBaseException, key: str, where: str) -> ConfigError:
    owners = other_owners(tuple(key.split(".")))
    if owners:
        cause = f"'{key}' has no effect with the chosen adapter"
        return ConfigError(cause, where=where, fix=f"it belongs to {', '.join(owners)}")
    parent = error.parent_node
    known = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    known = [name for name in known if name != "hydra"]
    listing = f"known here: {', '.join(known)}" if known else "see --cfg job"
    fix = f"{did_you_mean(key.rsplit('.', 1)[-1], known)} {listing}".strip()
    return ConfigError(f"'{key}' is not a setting", where=where or key, fix=fix)


def _first_line(error: BaseException) -> str:
    """The message without Hydra's advice on ``+`` and without the lines of its own bookkeeping."""
    text = _PLUS_ADVICE.sub("", str(error)) or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    if kept and kept[0].startswith("Ambiguous value for argument"):
        return (
            f"{kept[0]}: a list is key=[a,b], text with a comma is key='\"a,b\"', a sweep needs -m"
        )
    return redact_text(kept[0] if kept else type(error).__name__)


def _fix_of(error: BaseException) -> str:
    if "requires --multirun" in str(error) or "Ambiguous value" in str(error):
        return "to run one job for each value, add -m"
    return "see --cfg job and --info defaults"
