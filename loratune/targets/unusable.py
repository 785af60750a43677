"""What to say of layers that a pattern matches and that no adapter can do anything for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from loratune.adapters.config import LayerShape
from loratune.errors import ModelError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def left_out_notes(
    word: str, names: Sequence[str], reasons: Mapping[str, str], shapes: Sequence[LayerShape]
) -> list[str]:
    """One line for each reason why a word leaves layers out."""
    return [
        f"{word} leaves out {_count(of_one)} {reason}: {_summary(of_one, reasons, shapes)}"
        for reason, of_one in _by_reason(names, reasons).items()
    ]


def unusable_targets(
    names: Sequence[str], reasons: Mapping[str, str], shapes: Sequence[LayerShape]
) -> list[ModelError]:
    """One error for each reason why layers that the user named cannot be adapted."""
    return [
        ModelError(
            f"targets.modules names {_count(of_one)} {reason}: {_summary(of_one, reasons, shapes)}",
            where="targets.modules",
            fix="leave them out with targets.exclude, or name other layers",
        )
        for reason, of_one in _by_reason(names, reasons).items()
    ]


def _count(names: Sequence[str]) -> str:
    return "1 layer" if len(names) == 1 else f"{len(names):,} layers"


def _by_reason(names: Iterable[str], reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(reasons[name], []).append(name)
    return groups


def _summary(names: Sequence[str], reasons: Mapping[str, str], shapes: Sequence[LayerShape]) -> str:
    """The largest modules that hold only such layers, with ``*`` for numbers: all of them."""
    usable = [shape.name for shape in shapes if shape.name not in reasons]
    held = {prefix for name in usable for prefix in _prefixes(name)}
    owner_of = {name: next(p for p in _prefixes(name) if p not in held) for name in names}
    sizes = Counter(owner_of.values())
    shown = (name if sizes[owner] == 1 else owner for name, owner in owner_of.items())
    counts = Counter(_NUMBER.sub("*", one) for one in shown)
    return ", ".join(f"{one} ({count})" for one, count in counts.items())


def _prefixes(name: str) -> list[str]:
    """Every module that holds the layer, from the outermost, and the layer."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
