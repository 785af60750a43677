"""Patterns that name modules: role words, dotted suffixes, and time-limited regular expressions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import regex

from loratune.adapters.config import LayerKind, LayerPlace, LayerShape
from loratune.errors import ConfigError, SecurityError
from loratune.models.architectures import is_known_family, names_module
from loratune.targets.errors import no_roles
from loratune.targets.roles import ROLE_WORDS, RoleLayers, find_role_layers

_SECONDS = 1.0
_LONGEST = 2000
_Value = TypeVar("_Value")
ALL_LINEAR = ("all_linear", "all-linear")
EXPERTS = "experts"
ALL_LINEAR_AND_EXPERTS = "all_linear_and_experts"
# The first numbered segment is the block's index, as in PEFT (experts are numbered further down).
_BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")


class TimedPattern:
    """A regular expression whose matches take at most one second in total."""

    def __init__(self, pattern: str, where: str) -> None:
        """Compile ``pattern``; ``where`` is named in errors.

        Raises:
            ConfigError: if it is not a regular expression, or is overlong.
        """
        if len(pattern) > _LONGEST:
            cause = f"the pattern has {len(pattern)} characters, more than {_LONGEST}"
            raise ConfigError(cause, where=where, fix="give a list of names")
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            cause = f"'{pattern[:80]}' is not a regular expression: {error}"
            fix = "write names as a list: [q_proj, v_proj]"
            raise ConfigError(cause, where=where, fix=fix) from error
        self._pattern, self._where, self._left = pattern, where, _SECONDS

    def matches(self, name: str) -> bool:
        """Whether the whole ``name`` matches.

        Raises:
            SecurityError: when the time is used up.
        """
        start = time.perf_counter()
        try:
            match = self._compiled.fullmatch(name, timeout=max(self._left, 1e-3))
        except TimeoutError as error:
            cause = f"matching '{self._pattern[:80]}' took longer than {_SECONDS:g} s"
            fix = "simplify the pattern, or give a list of names"
            raise SecurityError(cause, where=self._where, fix=fix) from error
        self._left -= time.perf_counter() - start
        return match is not None


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
    patterns: Mapping[str, _Value], name: str, default: _Value, where: str
) -> _Value:
    """The value of the first pattern that fits ``name``, else ``default``."""
    key = fitting_keys(patterns, [name], where).get(name) if patterns else None
    return default if key is None else patterns[key]


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern and how it matches a full module name."""

    text: str
    matches: Callable[[str], bool]
    is_expression: bool = False


def block_of(name: str) -> int | None:
    """Index of the block that holds the layer, or ``None`` for a layer outside the blocks."""
    match = _BLOCK.match(name)
    return int(match.group(1)) if match else None


def is_word(modules: Any) -> bool:
    """Whether ``modules`` leaves it to the model which layers it means."""
    words = (*ALL_LINEAR, EXPERTS, ALL_LINEAR_AND_EXPERTS, *ROLE_WORDS)
    return isinstance(modules, str) and modules in words


def read_patterns(
    shapes: Sequence[LayerShape], modules: Any, family: str | None
) -> tuple[list[Pattern], list[str]]:
    """The patterns that ``modules`` stands for, and what to say about them.

    Raises:
        ConfigError: if it is neither a word, nor names, nor a regular expression.
        ModelError: if it is a role word and nobody knows the roles of this family.
    """
    if isinstance(modules, str) and modules in ALL_LINEAR:
        return _all_linear(shapes, modules)
    if modules == EXPERTS:
        return [_experts(shapes)], []
    if modules == ALL_LINEAR_AND_EXPERTS:
        patterns, notices = _all_linear(shapes, ALL_LINEAR[0])
        return [*patterns, _experts(shapes)], notices
    if isinstance(modules, str) and modules in ROLE_WORDS:
        return _role_patterns(shapes, modules, family)
    if isinstance(modules, str) and modules:
        timed = TimedPattern(modules, "targets.modules")
        return [Pattern(modules, timed.matches, is_expression=True)], []
    if (
        isinstance(modules, Sequence)
        and modules
        and all(isinstance(name, str) and name for name in modules)
    ):
        return [_suffix(name) for name in dict.fromkeys(modules)], []
    words = ", ".join((*ROLE_WORDS, "all_linear", EXPERTS, ALL_LINEAR_AND_EXPERTS))
    fix = f"use {words}, a list of names, or a regular expression"
    raise ConfigError(f"{modules!r} names no modules", where="targets.modules", fix=fix)


def _suffix(name: str) -> Pattern:
    """A name, or its end; stacked experts that are a module's ``weight`` answer to the module's."""

    def matches(layer: str) -> bool:
        return names_module(name, layer) or names_module(name, layer.removesuffix(".weight"))

    return Pattern(name, matches)


def _all_linear(shapes: Sequence[LayerShape], word: str) -> tuple[list[Pattern], list[str]]:
    """Every linear or Conv1D layer but the output head: what PEFT's ``all-linear`` means."""
    names = [
        shape.name
        for shape in shapes
        if shape.kind in (LayerKind.linear, LayerKind.conv1d) and shape.place is not LayerPlace.head
    ]
    outside = ", ".join(name for name in names if block_of(name) is None)
    notice = f"all_linear includes {outside}, outside the blocks, as PEFT's does"
    return [Pattern(word, set(names).__contains__)], [notice] if outside else []


def _experts(shapes: Sequence[LayerShape]) -> Pattern:
    """The layers of experts that are stacked in one tensor."""
    names = {shape.name for shape in shapes if shape.is_stacked}
    return Pattern(EXPERTS, names.__contains__)


def _role_patterns(
    shapes: Sequence[LayerShape], word: str, family: str | None
) -> tuple[list[Pattern], list[str]]:
    roles = find_role_layers(shapes, word)
    if roles is None:
        raise no_roles(word, family, shapes)
    patterns = [Pattern(path, set(names).__contains__) for path, names in roles.names.items()]
    notices = []
    if not is_known_family({"model_type": family}):
        notices.append(f"{word} is taken to mean {', '.join(roles.names)}")
    return patterns, notices + _role_notices(word, roles)


def _role_notices(word: str, roles: RoleLayers) -> list[str]:
    """What the layers hold beside what was asked for, and where there are none."""
    lines = [
        f"{word} adapts {path}, which holds {' and '.join(extra)} as well"
        for path, extra in roles.extra.items()
    ]
    lines += [
        f"{word}: {count} of {roles.blocks} blocks have {'none' if role == word else f'no {role}'}"
        for role, count in roles.missing.items()
    ]
    if roles.towers:
        lines.append(
            f"{word} means the text model; {', '.join(roles.towers)}, which reads no text, is left "
            "as it is"
        )
    return lines
