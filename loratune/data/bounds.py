"""Rows against the positions that a model has, before the first step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from loratune.data.cached_rows import row_lengths
from loratune.data.encoded_rows import EncodedRow
from loratune.data.findings import Finding, Severity
from loratune.data.rows import ERRORS_SHOWN, raise_first
from loratune.errors import DataError
from loratune.models.positions import learned_positions, positions


def check_positions(model: Any, *parts: Sequence[EncodedRow]) -> list[str]:
    """Compare the rows' lengths with the positions that the model knows.

    Returns:
        What to say of rows beyond the positions that a model with rotary ones was made for.

    Raises:
        DataError: naming the rows that go beyond a table of positions.
    """
    limit, long = _beyond(model, parts)
    if long and learned_positions(model) is None:
        return [f"note: {_rotary_line(limit, long)}; data.max_length={limit} stays within them"]
    errors = [
        DataError(
            f"{len(row):,} tokens, and the model has {limit:,} positions",
            where=row.source,
            fix=f"set data.max_length={limit}",
        )
        for row in long[:ERRORS_SHOWN]
    ]
    raise_first(errors, total=len(long))
    return []


def position_findings(model: Any, *parts: Sequence[EncodedRow]) -> Iterator[Finding]:
    """The same as a finding, for those who look before a weight is read.

    Args:
        model: the base, also one without weights.
        parts: rows of training and evaluation.
    """
    limit, long = _beyond(model, parts)
    if not long:
        return
    longest = max(long, key=len)
    if learned_positions(model) is None:
        severity, line = Severity.note, _rotary_line(limit, long)
        fix = f"data.max_length={limit} stays within them"
    else:
        count = "1 row is" if len(long) == 1 else f"{len(long):,} rows are"
        line = f"{count} longer than the model's {limit:,} positions, up to {len(longest):,} tokens"
        severity, fix = Severity.error, f"set data.max_length={limit}"
    yield Finding(severity, "positions", line, long[0].source, fix, len(long))


def _beyond(model: Any, parts: Sequence[Sequence[EncodedRow]]) -> tuple[int, list[EncodedRow]]:
    limit = positions(model) or sys.maxsize
    return limit, [
        rows[place]
        for rows in parts
        for place, length in enumerate(row_lengths(rows))
        if length > limit
    ]


def _rotary_line(limit: int, long: Sequence[EncodedRow]) -> str:
    count = "1 row is" if len(long) == 1 else f"{len(long):,} rows are"
    return f"{count} longer than the {limit:,} positions that the model was made for"
