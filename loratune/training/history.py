"""What a run recorded so far: the lines of ``metrics.jsonl`` and ``timings.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loratune.runs.records import Record, read_lines


@dataclass(frozen=True)
class History:
    """A training's records, from its first step, also where it was resumed."""

    metrics: Sequence[Record] = field(default_factory=list)
    timings: Sequence[Record] = field(default_factory=list)

    @classmethod
    def read(cls, metrics: Path, timings: Path) -> History:
        """From the two files of a run folder."""
        return cls(read_lines(metrics), read_lines(timings))

    def pairs(self, key: str) -> list[tuple[int, float]]:
        """Step and finite value of one quantity, in order."""
        return self._columns.get(key, [])

    def quantities(self) -> list[str]:
        """Every quantity that has a finite value."""
        return list(self._columns)

    @cached_property
    def _columns(self) -> dict[str, list[tuple[int, float]]]:
        columns: dict[str, list[tuple[int, float]]] = {}
        for rows in (self.metrics, self.timings):
            for row in rows:
                for key, value in row.items():
                    if _is_number(value):
                        columns.setdefault(key, []).append((row["step"], float(value)))
        return columns

    def values(self, key: str) -> list[float]:
        """The values alone."""
        return [value for _, value in self.pairs(key)]

    def last(self, key: str) -> float | None:
        """The newest value."""
        return next(iter(self.values(key)[-1:]), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
