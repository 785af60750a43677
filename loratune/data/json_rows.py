"""JSON lines and JSON lists, with the place of every mistake: line and column, or row."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import IO, Any

from loratune.data.rows import ERRORS_SHOWN, Row, raise_first
from loratune.errors import DataError

_BOM = b"\xef\xbb\xbf"


def read_json_lines(stream: IO[bytes], label: str) -> Iterator[Row]:
    """One object a line; blank lines are not rows.

    After the first bad line no more rows come: the rest is only searched for further bad lines,
    and all are raised together.

    Raises:
        DataError: ``label:line`` and column of what is not a JSON object in UTF-8.
    """
    problems: list[DataError] = []
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            columns = _parse_line(line, f"{label}:{number}", offset)
        except DataError as problem:
            problems.append(problem)
            if len(problems) == ERRORS_SHOWN:
                break
        else:
            if columns is not None and not problems:
                yield Row(columns, f"{label}:{number}")
        offset += len(line)
    raise_first(problems)


def _parse_line(line: bytes, where: str, offset: int) -> dict[str, Any] | None:
    body = line.removeprefix(_BOM) if offset == 0 else line
    text = decode(body, where, offset)
    if not text.strip():
        return None
    try:
        value = json.loads(text.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        ended = line.endswith(b"\n")
        raise _not_json(error, where, terminated=ended) from error
    return _as_columns(value, where)


def read_json(stream: IO[bytes], label: str) -> Iterator[Row]:
    """A list of objects, or JSON lines under the name ``.json``.

    Raises:
        DataError: ``label:line`` and column of what is neither.
    """
    content = stream.read().removeprefix(_BOM)
    if content.lstrip()[:1] == b"[":
        yield from _read_list(decode_whole(content, label), label)
        return
    if _is_one_object(content):
        cause = "the file holds one object, not a list of rows"
        raise DataError(cause, where=label, fix="write a list [...] or one object a line")
    yield from read_json_lines(io.BytesIO(content), label)


def _is_one_object(content: bytes) -> bool:
    """Whether a ``.json`` file is one object spread over several lines."""
    first = content.lstrip().partition(b"\n")[0].rstrip()
    return first == b"{" or (first.startswith(b"{") and first.endswith((b"[", b"{", b",")))


def _read_list(text: str, label: str) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        terminated = error.pos < len(text.rstrip())
        raise _not_json(error, f"{label}:{error.lineno}", terminated=terminated) from error
    except (ValueError, RecursionError) as error:
        raise _not_json(error, label, terminated=True) from error
    for number, value in enumerate(values, start=1):
        where = f"{label}, row {number}"
        yield Row(_as_columns(value, where), where)


def _as_columns(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        cause = f"a row must be a JSON object, this is a {type(value).__name__}"
        raise DataError(cause, where=where, fix='write {"prompt": "...", "completion": "..."}')
    return value


def _not_json(error: Exception, where: str, *, terminated: bool) -> DataError:
    if isinstance(error, RecursionError):
        return DataError("nested too deeply", where=where)
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"not valid JSON: {str(error).partition(';')[0]}", where=where)
    where = f"{where}, column {error.colno}"
    if terminated:
        return DataError(f"not valid JSON: {error.msg}", where=where)
    fix = "the file was cut short: copy it again, or finish the last line"
    return DataError(f"unterminated last line: {error.msg}", where=where, fix=fix)


def decode(content: bytes, where: str, offset: int = 0) -> str:
    """One line as text.

    Args:
        content: the bytes of the line.
        where: ``file:line``.
        offset: bytes of the file before this line.

    Raises:
        DataError: which byte, where in the line and in the file.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        place = f"{where}, byte {error.start + 1} of the line, offset {offset + error.start}"
        cause = f"byte 0x{byte:02X} is not UTF-8"
        raise DataError(cause, where=place, fix="save the file as UTF-8") from error


def decode_whole(content: bytes, label: str) -> str:
    """A whole file as text.

    Raises:
        DataError: which byte, in which line.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        number = content.count(b"\n", 0, start) + 1
        end = content.find(b"\n", start)
        line = content[start : end if end >= 0 else None]
        return decode(line, f"{label}:{number}", start)
