"""Rows from local files with line numbers, or from the hub.

json, jsonl and csv are read here, so that an error names the file, the line and the column;
parquet and hub ids go through ``datasets``, imported only then.
"""

from __future__ import annotations

import gzip
import itertools
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from loratune.data.json_rows import read_json, read_json_lines
from loratune.data.rows import Row
from loratune.data.sources import DataFile, find_files, is_hub_id, read_error
from loratune.data.table_rows import read_table
from loratune.errors import DataError, LoratuneError, SeveralErrors

_PATH = "data.path"
EVAL_PATH = "data.eval_path"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_rows(
    path: str, *, split: str = "train", limit: int | None = None, key: str = _PATH
) -> list[Row]:
    """Every row of ``data.path`` in order, or the first ``limit``.

    Args:
        path: jsonl, json, csv, tsv or parquet file (the text kinds also gzipped), a folder or a
            pattern of such files, ``builtin:NAME``, or a hub id.
        split: which split of a hub data set.
        limit: stop after so many rows.
        key: the setting that names ``path``, for messages.

    Raises:
        DataError: nothing there, unreadable, malformed (with ``file:line``), or no row at all.
    """
    try:
        return list(RowsInFiles(path, split, limit))
    except DataError as error:
        if error.where == _PATH:
            error.where = key
        raise


@dataclass(frozen=True)
class RowsInFiles:
    """The rows that ``read_rows`` gives, read anew each time that one goes through them."""

    path: str
    split: str = "train"
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        some = False
        for row in itertools.islice(_all_rows(self.path, self.split), self.limit):
            some = True
            yield row
        if not some:
            fix = "every row counts once it holds a JSON object or a line below the header"
            raise DataError(f"'{self.path}' has 0 rows", where=_PATH, fix=fix)

    def blocks(self, size: int) -> Iterator[list[Row]]:
        """``size`` of them at a time, the last time perhaps fewer."""
        rows = iter(self)
        while block := list(itertools.islice(rows, size)):
            yield block


@contextmanager
def read_for(key: str) -> Iterator[None]:
    """Errors of the block about ``data.eval_path`` name ``key``, whose rows are read in its place.

    Raises:
        LoratuneError: what the block raises.
    """
    try:
        yield
    except LoratuneError as error:
        for one in error.errors if isinstance(error, SeveralErrors) else [error]:
            one.where = one.where.replace(EVAL_PATH, key)
        raise


def _all_rows(path: str, split: str) -> Iterator[Row]:
    if is_hub_id(path):
        yield from _hub_rows(path, split)
        return
    for file in find_files(path):
        yield from _file_rows(file)


def _file_rows(file: DataFile) -> Iterator[Row]:
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
        return
    try:
        with _open(file) as stream:
            if file.suffix == ".json":
                yield from read_json(stream, file.label)
            elif file.suffix in _DELIMITERS:
                yield from read_table(stream, file.label, _DELIMITERS[file.suffix])
            else:
                yield from read_json_lines(stream, file.label)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, zlib.error):
            error = EOFError(f"damaged gzip file ({error})")
        raise read_error(error, file.label) from error


def _open(file: DataFile) -> IO[bytes]:
    if file.path.name.lower().endswith(".gz"):
        return gzip.open(file.path, "rb")  # type: ignore[return-value]
    return file.path.open("rb")


def _parquet_rows(file: DataFile) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="loratune-") as cache:
        options = {"data_files": [str(file.path)], "split": "train", "cache_dir": cache}
        rows = _load("parquet", options, f"cannot read '{file.label}'", "is it a parquet file?")
        for number, columns in enumerate(rows, start=1):
            yield Row(columns, f"{file.label}:row {number}")


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    cause = f"no local file or folder '{path}', and the hub gave no data set of that name"
    fix = "check the name and data.split; offline, use local files or a data set cached before"
    for number, columns in enumerate(_load(path, {"split": split}, cause, fix), start=1):
        yield Row(columns, f"{path}[{split}]:row {number}")


def _load(name: str, options: dict[str, Any], cause: str, fix: str) -> list[Mapping[str, Any]]:
    """Rows through ``datasets``; whatever it raises becomes one DataError."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets

        return list(datasets.load_dataset(name, **options))
    except Exception as error:  # datasets raises its own and pyarrow's types, some of them bare
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(f"{cause} ({reason})", where=_PATH, fix=fix) from error
