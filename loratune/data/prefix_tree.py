"""Rows laid out in one sequence, so that what they begin with in common stands there once.

The rows of a sequence form a tree of tokens, written depth first.  A token sees the tokens on the
path from the root to it: its row up to itself.  Where no rows share anything, the tree is a row of
chains: plain packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loratune.data.encoded_rows import EncodedRow


@dataclass
class Layout:
    """One sequence that holds several rows.

    Attributes:
        ids: token ids, depth first.
        positions: of each token in its rows.
        ends: for each token the end of its subtree: tokens from there on do not see it.
        targets: for each supervised token where it is predicted, and the token.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    targets: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[EncodedRow], *, share: bool) -> Layout:
        """Lay out rows in their order; sharing needs rows of one beginning to stand together."""
        layout = cls()
        path: list[int] = []
        before: list[int] = []
        for row in rows:
            common = common_length(before, row.input_ids) if share else 0
            path = layout._append(row, path[:common])
            before = row.input_ids
        return layout

    def _append(self, row: EncodedRow, path: list[int]) -> list[int]:
        """Write what follows the shared path; returns where each token of the row stands."""
        start, new = len(self.ids), row.input_ids[len(path) :]
        end = start + len(new)
        self.ids += new
        self.positions += range(len(path), len(row))
        self.ends += [end] * len(new)
        for place in path:
            self.ends[place] = end
        path = [*path, *range(start, end)]
        for first, last in row.spans:
            self.targets += zip(path[first - 1 : last - 1], row.input_ids[first:last], strict=True)
        return path


def common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two rows begin with in common."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])


def prefix_ranks(rows: Sequence[EncodedRow]) -> list[int]:
    """For each row its place in the order in which rows of one beginning stand together."""
    ranks = [0] * len(rows)
    for rank, place in enumerate(tree_order(rows)):
        ranks[place] = rank
    return ranks


def tree_order(rows: Sequence[EncodedRow]) -> list[int]:
    """Places of the rows in the order in which those of one beginning stand together."""
    return sorted(range(len(rows)), key=lambda place: rows[place].input_ids)
