"""Several rows in one sequence: which rows lie together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loratune.data.encoded_rows import EncodedRow
from loratune.data.prefix_tree import common_length, tree_order
from loratune.errors import DataError

Bins = list[list[int]]
"""Places of rows, grouped by sequence."""


def pack(lengths: Sequence[int], max_length: int) -> Bins:
    """Rows in as few sequences as first-fit decreasing finds, of as even length as it can.

    Args:
        lengths: tokens of each row.
        max_length: tokens that one sequence may hold.

    Raises:
        DataError: if a row alone is too long.
    """
    if not lengths:
        return []
    longest = max(lengths)
    if longest > max_length:
        raise DataError(f"a row of {longest} tokens does not fit into {max_length}")
    return _evened(lambda capacity: _first_fit(lengths, capacity), longest, max_length)


def pack_trees(rows: Sequence[EncodedRow], max_length: int) -> Bins:
    """Rows in sequences whose prefix trees hold at most ``max_length`` tokens, or one row's.

    Rows of one beginning lie together; where a sequence is full, the next repeats it.
    """
    if not rows:
        return []
    order, longest = tree_order(rows), max(map(len, rows))
    lengths = [len(rows[place]) for place in order]
    pairs = zip([rows[place].input_ids for place in order], order[1:], strict=False)
    shared = [0, *(common_length(before, rows[place].input_ids) for before, place in pairs)]

    def fill(capacity: int) -> Bins:
        bins: Bins = []
        room = 0
        for place, length, common in zip(order, lengths, shared, strict=True):
            cost = length - common
            if not bins or cost > room:
                bins.append([])
                room, cost = capacity, length
            bins[-1].append(place)
            room -= cost
        return bins

    return _evened(fill, longest, max(longest, max_length))


def _evened(fill: Callable[[int], Bins], least: int, most: int) -> Bins:
    """The bins of the smallest capacity that needs no more of them than the largest.

    Evening out matters because the sequences of a batch are padded to the longest of them.
    """
    best = fill(most)
    low, high = least, most
    while low < high:
        capacity = (low + high) // 2
        bins = fill(capacity)
        if len(bins) <= len(best):
            best, high = bins, capacity
        else:
            low = capacity + 1
    return best


def _first_fit(lengths: Sequence[int], capacity: int) -> Bins:
    """First-fit decreasing: each row, longest first, into the first sequence with room."""
    bins: Bins = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((n for n, left in enumerate(room) if left >= lengths[row]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(row)
        room[place] -= lengths[row]
    return bins
