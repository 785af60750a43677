"""Rows of several sources in the shares that their weights ask for.

An epoch of a mixture draws as many rows as all its sources hold together.  Of these, a source
gives its weight's share, whatever its size: to the row in every epoch, and spread evenly over it,
so that a step has the shares too as nearly as whole rows allow.  Each source is an endless
sequence of passes over its rows, every pass in a fresh order, and an epoch goes on where the one
before stopped: rows of a small source come again, and all of them equally often.  The order is a
function of the seed, the weights and the number of rows of each source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from loratune.data.encoded_rows import EncodedRow
from loratune.data.split import shuffled

_OWN_ORDER = 3
"""Sets the orders within sources apart from the other orders drawn from a seed."""


@dataclass(frozen=True)
class Mixture:
    """Which rows belong to which source.

    Attributes:
        names: of the sources.
        weights: theirs.
        members: numbers of their rows; none is empty.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[EncodedRow], weights: Mapping[str, float]) -> Mixture | None:
        """The mixture of rows that say their source; ``None`` where there are no sources.

        Args:
            rows: encoded rows.
            weights: name to weight of every source; one without rows is left out.
        """
        if not weights:
            return None
        members: dict[str, list[int]] = {name: [] for name in weights}
        for number, row in enumerate(rows):
            if row.origin in members:
                members[row.origin].append(number)
        present = {name: tuple(numbers) for name, numbers in members.items() if numbers}
        if not present:
            return None
        return cls(tuple(present), tuple(weights[n] for n in present), tuple(present.values()))

    @property
    def draws(self) -> tuple[int, ...]:
        """Rows drawn from each source in one epoch; together as many as the sources hold."""
        return apportioned(sum(map(len, self.members)), self.weights)

    def epoch(self, number: int, seed: int) -> list[int]:
        """Row numbers of an epoch (from 0), in the order in which they are trained on."""
        drawn = [
            self._drawn(source, number * count, (number + 1) * count, seed)
            for source, count in enumerate(self.draws)
        ]
        # Of n rows, the k-th has its place at (k + 1/2) / n of the epoch.
        placed = [
            ((2 * k + 1) / (2 * len(rows)), source, row)
            for source, rows in enumerate(drawn)
            for k, row in enumerate(rows)
        ]
        return [row for *_, row in sorted(placed, key=lambda one: one[:2])]

    def by_length(self, order: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """``order`` with every source's rows sorted by length in the places that it has."""
        own: dict[int, list[int]] = {}
        for row in order:
            own.setdefault(self._source_of[row], []).append(row)
        following = {
            source: iter(sorted(rows, key=lengths.__getitem__)) for source, rows in own.items()
        }
        return [next(following[self._source_of[row]]) for row in order]

    @cached_property
    def _source_of(self) -> dict[int, int]:
        return {row: source for source, rows in enumerate(self.members) for row in rows}

    def _drawn(self, source: int, start: int, stop: int, seed: int) -> list[int]:
        """Places ``[start, stop)`` of a source's endless sequence of passes."""
        members = self.members[source]
        first, last = start // len(members), -(-stop // len(members))
        passes = [
            members[place]
            for number in range(first, last)
            for place in shuffled(len(members), seed, number, _OWN_ORDER, source)
        ]
        offset = first * len(members)
        return passes[start - offset : stop - offset]


def apportioned(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """``total`` divided by weight into whole numbers of at least 1, by largest remainders.

    Args:
        total: at least the number of weights.
        weights: each above 0.
    """
    whole = sum(map(Fraction, weights))
    exact = [total * Fraction(weight) / whole for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    order = sorted(range(len(counts)), key=lambda n: counts[n] - exact[n])
    for place in range(total - sum(counts)):
        counts[order[place]] += 1
    while sum(counts) > total:  # tiny shares were raised to 1
        counts[counts.index(max(counts))] -= 1
    return tuple(counts)


def seen_line(times: Mapping[str, float]) -> str:
    """How often a run sees the rows of each source, for people."""
    parts = ", ".join(f"{name} {count:.2f} times" for name, count in times.items())
    return f"each row of a source is seen on average: {parts}"
