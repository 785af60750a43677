"""Rows of several sources in the shares that their weights ask for.

An epoch of a mixture draws as many rows as all its sources hold together.  Of these, a source
gives its weight's share, whatever its size: to the row in every epoch, in expectation in a step.
Each source is an endless sequence of passes over its rows, every pass in a fresh order, and an
epoch goes on where the one before stopped.  So rows of a small source come again, and no row of a
source comes a second time more often than another.  The order is a function of the seed, the
weights and the number of rows of each source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

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
            row
            for source, count in enumerate(self.draws)
            for row in self._drawn(source, number * count, (number + 1) * count, seed)
        ]
        return [drawn[place] for place in shuffled(len(drawn), seed, number)]

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
