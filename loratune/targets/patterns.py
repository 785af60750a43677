"""Patterns that name modules: whole dotted suffixes and time-limited regular expressions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TypeVar

import regex

from loratune.errors import ConfigError, SecurityError

_SECONDS = 1.0
_LONGEST = 2000
_Value = TypeVar("_Value")


class TimedPattern:
    """A regular expression whose matches take at most one second in total."""

    def __init__(self, pattern: str, where: str) -> None:
        """Compile ``pattern``; ``where`` is named in errors.

        Raises:
            ConfigError: if it is not a regular expression, or is overlong.
        """
        if len(pattern) > _LONGEST:
            raise ConfigError(
                f"the pattern has {len(pattern)} characters, more than {_LONGEST}",
                where=where,
                fix="give a list of names",
            )
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"'{pattern[:80]}' is not a regular expression: {error}",
                where=where,
                fix="write names as a list: [q_proj, v_proj]",
            ) from error
        self._pattern, self._where, self._left = pattern, where, _SECONDS

    def matches(self, name: str) -> bool:
        """Whether the whole ``name`` matches.

        Raises:
            SecurityError: when the time is used up.
        """
        start = time.perf_counter()
        try:
            found = self._compiled.fullmatch(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError as error:
            raise SecurityError(
                f"matching '{self._pattern[:80]}' took longer than {_SECONDS:g} s",
                where=self._where,
                fix="simplify the pattern, or give a list of names",
            ) from error
        self._left -= time.perf_counter() - start
        return found


def fitting_keys(
    patterns: Mapping[str, object], names: Iterable[str], where: str
) -> dict[str, str]:
    """Name to the first key that is its end at a dot, as a regular expression, as in PEFT.

    Raises:
        ConfigError: if a key is not a regular expression.
        SecurityError: if a key takes longer than a second over all names.
    """
    compiled = {key: TimedPattern(rf"(.*\.)?({key})", where) for key in patterns}
    fitting = {}
    for name in names:
        key = next((key for key, pattern in compiled.items() if pattern.matches(name)), None)
        if key is not None:
            fitting[name] = key
    return fitting


def resolve_pattern(
    patterns: Mapping[str, _Value], name: str, default: _Value, where: str = "adapter"
) -> _Value:
    """The value of the first pattern that fits ``name``, else ``default``."""
    key = fitting_keys(patterns, [name], where).get(name) if patterns else None
    return default if key is None else patterns[key]
