"""Rows against the positions that a model has, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loratune.data.encoded_rows import EncodedRow
from loratune.data.rows import ERRORS_SHOWN, raise_first
from loratune.errors import DataError
from loratune.models.positions import learned_positions, positions


def check_positions(rows: Sequence[EncodedRow], model: Any) -> list[str]:
    """Compare the rows' lengths with the positions that the model knows.

    Returns:
        What to say of rows beyond the positions that a model with rotary ones was made for.

    Raises:
        DataError: naming the rows that go beyond a table of positions.
    """
    limit = positions(model)
    long = [row for row in rows if limit is not None and len(row) > limit]
    if not long:
        return []
    if learned_positions(model) is None:
        count = "1 row is" if len(long) == 1 else f"{len(long):,} rows are"
        line = f"{count} longer than the {limit:,} positions that the model was made for"
        return [f"note: {line}; data.max_length={limit} stays within them"]
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
