"""JSON lines and JSON lists, with the place of every mistake: line and column, or row.

Numbers keep the digits that they have in the file.  What JSON does not define (NaN, Infinity) and
what one reader would read otherwise than another (a key given twice) is an error.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from loratune.data.rows import ERRORS_SHOWN, Number, Row, raise_first, shown
from loratune.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


class _NotAllowed(ValueError):
    """Something that Python's reader would take and a row must not hold."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.fix = fix


def _whole(literal: str) -> Any:
    try:
        value = int(literal)
    except ValueError:  # more digits than Python converts: the row may not even use them
        return Number(literal)
    return Number(literal) if literal == "-0" else value


def _fraction(literal: str) -> Any:
    value = float(literal)
    return value if repr(value) == literal else Number(literal)


def _constant(name: str) -> NoReturn:
    raise _NotAllowed(f"{name} is not a number in JSON", "write null, or the word in quotes")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _NotAllowed(f"the key {shown(repeated)} is given twice", "keep one of them")
    return values


_DECODER = json.JSONDecoder(
    parse_int=_whole, parse_float=_fraction, parse_constant=_constant, object_pairs_hook=_object
)


def parse_json(text: str) -> Any:
    """JSON that a column holds as text, read as strictly as the rows themselves.

    Raises:
        DataError: saying why it is not JSON.
    """
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{shown(text)} is not JSON: {reason}", fix="write valid JSON") from error


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
        value = _DECODER.decode(text.rstrip("\r\n"))
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
    place: int | None = _after_space(text, text.index("[") + 1)
    number, line, counted = 0, 1, 0
    while place is not None and (number or text[place : place + 1] != "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = _DECODER.raw_decode(text, place)
            place = _next_item(text, end)
        except json.JSONDecodeError as error:
            terminated = error.pos < len(text.rstrip())
            raise _not_json(error, f"{label}:{error.lineno}", terminated=terminated) from error
        except (ValueError, RecursionError) as error:
            raise _not_json(error, f"{label}:{line}", terminated=True) from error
        number += 1
        where = f"{label}, row {number}"
        yield Row(_as_columns(value, where), where)


def _next_item(text: str, end: int) -> int | None:
    """Where the item after one that ends at ``end`` begins; None behind the list's last."""
    end = _after_space(text, end)
    if text[end : end + 1] == ",":
        return _after_space(text, end + 1)
    if text[end : end + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    rest = _after_space(text, end + 1)
    if rest < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)
    return None


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


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
    if isinstance(error, _NotAllowed):
        return DataError(str(error), where=where, fix=error.fix)
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
