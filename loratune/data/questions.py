"""Rows that ask the same thing belong together: one prompt may have several answers."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from loratune.data.encoded_rows import EncodedRow


def question(row: EncodedRow) -> Hashable:
    """What makes rows belong together: the prompt's ids, or the whole row for plain text."""
    cut = row.prompt_length
    return tuple(row.input_ids[:cut]) if cut > 1 else tuple(row.input_ids)


def units(rows: Sequence[EncodedRow]) -> list[list[int]]:
    """Row numbers by question, in the order of first rows: what a bootstrap resamples."""
    groups: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(question(row), []).append(number)
    return list(groups.values())
