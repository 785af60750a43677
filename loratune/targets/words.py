"""What ``targets.modules`` means: role words, names, or a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.adapters.config import LayerKind, LayerShape
from loratune.errors import ConfigError
from loratune.models.architectures import ROLE_WORDS, is_known_family, names_module, roles_of
from loratune.targets.errors import no_roles
from loratune.targets.patterns import TimedPattern

ALL_LINEAR = ("all_linear", "all-linear")
_OUTPUT_HEADS = ("lm_head", "embed_out")
# The first numbered segment is the block's index, as in PEFT (experts are numbered further down).
_BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")


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


def read_patterns(
    shapes: Sequence[LayerShape], modules: Any, family: str | None
) -> tuple[list[Pattern], list[str]]:
    """The patterns that ``modules`` stands for, and what to say about them.

    Raises:
        ConfigError: if it is neither a word, nor names, nor a regular expression.
        ModelError: if it is a role word and nobody knows the roles of this family.
    """
    if isinstance(modules, str) and modules in ALL_LINEAR:
        return [_all_linear(shapes, modules)], _all_linear_notices(shapes)
    if isinstance(modules, str) and modules in ROLE_WORDS:
        return _role_patterns(shapes, modules, family)
    if isinstance(modules, str) and modules:
        timed = TimedPattern(modules, "targets.modules")
        return [Pattern(modules, timed.matches, is_expression=True)], []
    if isinstance(modules, Sequence) and modules and all(_is_name(name) for name in modules):
        return [_suffix(name) for name in dict.fromkeys(modules)], []
    raise ConfigError(
        f"{modules!r} names no modules",
        where="targets.modules",
        fix=f"use {', '.join(ROLE_WORDS)}, all_linear, a list of names, or a regular expression",
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _suffix(name: str) -> Pattern:
    return Pattern(name, lambda module: names_module(name, module))


def _all_linear(shapes: Sequence[LayerShape], word: str) -> Pattern:
    """Every linear or Conv1D layer but the output head: what PEFT's ``all-linear`` means."""
    names = {
        shape.name
        for shape in shapes
        if shape.kind is not LayerKind.embedding
        and not any(names_module(head, shape.name) for head in _OUTPUT_HEADS)
    }
    return Pattern(word, names.__contains__)


def _all_linear_notices(shapes: Sequence[LayerShape]) -> list[str]:
    outside = [
        shape.name
        for shape in shapes
        if shape.kind is not LayerKind.embedding
        and block_of(shape.name) is None
        and not any(names_module(head, shape.name) for head in _OUTPUT_HEADS)
    ]
    if not outside:
        return []
    return [f"all_linear includes {', '.join(outside)}, outside the blocks, as PEFT's does"]


def frozen_experts(
    patterns: Sequence[Pattern], counts: Mapping[str, int], stacked: Mapping[str, int]
) -> list[str]:
    """What to say where patterns that match layers would mean the layers of experts too."""
    lines = []
    for pattern in patterns:
        everything = pattern.text in ALL_LINEAR
        names = [name for name in stacked if everything or pattern.matches(name)]
        if names and counts[pattern.text]:
            frozen = sum(stacked[name] for name in names)
            lines.append(
                f"{pattern.text} leaves {frozen:,} parameters of experts frozen: {names[0]}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}, stacked in one tensor "
                "each, cannot be adapted"
            )
    return lines


def _role_patterns(
    shapes: Sequence[LayerShape], word: str, family: str | None
) -> tuple[list[Pattern], list[str]]:
    wanted = ROLE_WORDS[word]
    roles = roles_of(family, shapes, wanted)
    if roles is None:
        raise no_roles(word, family, shapes)
    suffixes = dict.fromkeys(roles[role] for role in wanted if role in roles)
    notices = []
    if not is_known_family({"model_type": family}):
        notices.append(f"{word} is taken to mean {', '.join(suffixes)}")
    for suffix in suffixes:
        extra = [role for role, name in roles.items() if name == suffix and role not in wanted]
        if extra:
            notices.append(f"{word} adapts {suffix}, which holds {' and '.join(extra)} as well")
    return [_suffix(suffix) for suffix in suffixes], notices
