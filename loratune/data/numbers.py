"""Numbers of a row as other programs write them: with the digits that they have in the file.

A chat template is given floats, and so is ``json``: both would write 4.5 for 4.50.  Each number
that Python writes otherwise is therefore replaced by a neighbour that stands nowhere else, and
what was written of the neighbour by what the file says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from loratune.data.rows import Number

_GOLDEN = 0.6180339887498949
_LARGEST = 1e300
_NEAR, _NEAR_ZERO = 1e-7, 1e-12
_SHORTEST = 14
"""Characters of a neighbour: digits enough to stand nowhere else."""


class StandIns:
    """Neighbours in the place of numbers.

    Args:
        value: nested lists and objects.
        salt: two of them give two sets of neighbours.

    Attributes:
        value: the same with neighbours.
        literals: each number as the file has it, in order, once.
    """

    def __init__(self, value: Any, salt: int = 0) -> None:
        numbers = {number.literal: number for number in _numbers(value)}
        self.literals = tuple(numbers)
        self._written: dict[str, str] = {}
        neighbours: dict[str, float] = {}
        taken = json.dumps(value, ensure_ascii=False, default=str) if numbers else ""
        for place, (literal, number) in enumerate(numbers.items()):
            neighbours[literal] = _neighbour(number, 2 * place + salt, taken)
            self._written[repr(neighbours[literal])] = literal
            taken += f" {neighbours[literal]!r}"
        self.value = _mapped(value, neighbours) if numbers else value
        longest_first = sorted(self._written, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def restore(
        self, text: str, places: Sequence[tuple[int, int]] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """What was written, with the numbers of the file, and ranges of it moved likewise."""
        if not self._written:
            return text, list(places)
        written, done = "", 0
        ends = [(0, 0)]  # of what is written so far, before and after
        for match in self._pattern.finditer(text):
            written += text[done : match.start()] + self._written[match.group()]
            done = match.end()
            ends.append((done, len(written)))

        def moved(place: int) -> int:
            before, after = next(end for end in reversed(ends) if end[0] <= place)
            return place - before + after

        return written + text[done:], [(moved(start), moved(end)) for start, end in places]


def json_text(value: Any) -> str:
    """``value`` as JSON, with the numbers of the file."""
    stand_ins = StandIns(value)
    return stand_ins.restore(json.dumps(stand_ins.value, ensure_ascii=False))[0]


def _numbers(value: Any) -> list[Number]:
    if isinstance(value, Number):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for item in items for number in _numbers(item)]


def _mapped(value: Any, neighbours: dict[str, float]) -> Any:
    if isinstance(value, Number):
        return neighbours[value.literal]
    if isinstance(value, dict):
        return {key: _mapped(item, neighbours) for key, item in value.items()}
    return [_mapped(item, neighbours) for item in value] if isinstance(value, list) else value


def _neighbour(number: Number, start: int, taken: str) -> float:
    """A float close to ``number`` whose digits are not yet there."""
    base = float(number) if math.isfinite(number) else math.copysign(_LARGEST, number)
    span = abs(base) * _NEAR or _NEAR_ZERO
    step = start
    while True:
        step += 1
        near = base + math.copysign(span * (0.1 + step * _GOLDEN % 1), base)
        if len(repr(near)) >= _SHORTEST and repr(near) not in taken:
            return near


Written = tuple[str, list[tuple[int, int]]]


def written_twice(value: Any, write: Callable[[Any], Written]) -> Written | None:
    """What ``write`` makes of ``value`` with the numbers of the file; None if it reckons with them.

    Two sets of neighbours must give the same: then each number is written and nothing else.
    """
    written = []
    for salt in (0, 1):
        stand_ins = StandIns(value, salt)
        written.append(stand_ins.restore(*write(stand_ins.value)))
        if not stand_ins.literals:
            return written[0]
    return written[0] if written[0] == written[1] else None
