"""Words of commands: the formats of their results, and the reader where no recipe is composed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from os.path import exists

from loratune.errors import ConfigError, raise_together, unknown_setting


class TableOrJson(StrEnum):
    """For people or for programs."""

    table = "table"
    json = "json"


class TableFormat(StrEnum):
    """Of commands whose result is tables."""

    table = "table"
    md = "md"
    csv = "csv"
    json = "json"


def read_arguments(
    arguments: Sequence[str], settings: Mapping[str, Sequence[str]]
) -> tuple[list[str], dict[str, str]]:
    """Plain words in order, and the value of every setting among them.

    Args:
        arguments: the words after the subcommand.
        settings: the settings that the command takes, each with its choices (none: any value).

    Raises:
        ConfigError: for a flag, an unknown setting, a value that is not among the choices, and a
            setting given twice, all at once.
    """
    plain, values, problems = list[str](), dict[str, str](), list[ConfigError]()
    for word in arguments:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            fix = f"settings are key=value; available: {', '.join(settings) or 'none'}"
            problems.append(ConfigError(f"there is no flag '{word}'", where=word, fix=fix))
        elif not equals or "/" in key or (key not in settings and exists(word)):
            plain.append(word)
        elif key not in settings:
            problems.append(unknown_setting(key, settings))
        elif key in values:
            problems.append(ConfigError(f"'{key}' is set twice", where=word, fix="set it once"))
        elif (choices := settings[key]) and value not in choices:
            cause = f"{key} must be {' or '.join(choices)}, got '{value}'"
            problems.append(ConfigError(cause, where=key))
        else:
            values[key] = value
    raise_together(problems)
    return plain, values
