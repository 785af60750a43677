"""Comma- and tab-separated rows, read with the line of every mistake."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator
from typing import IO

from loratune.data.json_rows import decode_whole
from loratune.data.rows import Row, listed
from loratune.errors import DataError

_LONGEST_FIELD = 1 << 30
_limit_lock = threading.Lock()


def read_table(stream: IO[bytes], label: str, delimiter: str) -> Iterator[Row]:
    """One row a record; the first record names the columns.

    Raises:
        DataError: ``label:line`` of a record with too many or too few fields, an open quote, a
            column named twice, or text that is not UTF-8.
    """
    text = decode_whole(stream.read(), label).removeprefix("\ufeff")
    records = _records(text, label, delimiter)
    header = next(records, None)
    if header is None:
        return
    names = [name.strip() for name in header[1]]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"the header names {listed(repeated)} twice", where=f"{label}:1")
    for line, fields in records:
        if len(fields) != len(names):
            cause = f"{len(fields)} fields where the header names {len(names)}"
            fix = "put text that holds the delimiter or a line break in double quotes"
            raise DataError(cause, where=f"{label}:{line}", fix=fix)
        yield Row(dict(zip(names, fields, strict=True)), f"{label}:{line}")


def _records(text: str, label: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """First line and fields of every record that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = _next_record(reader)
        except csv.Error as error:
            reason = "unterminated quote" if "unexpected end" in str(error) else str(error)
            raise DataError(f"not valid csv: {reason}", where=f"{label}:{line}") from error
        if fields is None:
            return
        if fields:
            yield line, fields


def _next_record(reader: Iterator[list[str]]) -> list[str] | None:
    # The csv module's limit is one number for the whole process: raised here, then put back.
    with _limit_lock:
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(before)
