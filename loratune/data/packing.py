"""Several rows in one sequence: which rows lie together."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.errors import DataError


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows in as few sequences as first-fit decreasing finds, of as even length as it can.

    Evening out matters because the sequences of a batch are padded to the longest of them.

    Args:
        lengths: tokens of each row.
        max_length: tokens that one sequence may hold.

    Returns:
        Positions in ``lengths``, grouped by sequence.

    Raises:
        DataError: if a row alone is too long.
    """
    if not lengths:
        return []
    longest = max(lengths)
    if longest > max_length:
        raise DataError(f"a row of {longest} tokens does not fit into {max_length}")
    best = _first_fit(lengths, max_length)
    low, high = max(longest, -(-sum(lengths) // len(best))), max_length
    while low < high:
        capacity = (low + high) // 2
        bins = _first_fit(lengths, capacity)
        if len(bins) <= len(best):
            best, high = bins, capacity
        else:
            low = capacity + 1
    return best


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: each row, longest first, into the first sequence with room."""
    bins: list[list[int]] = []
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
