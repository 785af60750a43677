"""Encoded rows in a file: read where they lie, a few at a time, however many there are."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from loratune.data.encoded_rows import EncodedRow

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = "rows.arrow"
LENGTHS = "lengths.npy"
BLOCK = 256
"""Rows that are written and read together."""
_NESTED = ("spans", "spelt_text")


class CachedRows(Sequence[EncodedRow]):
    """The rows that a ``RowStore`` wrote into a folder.

    Only their lengths are mapped into memory; a row is read when it is asked for, so that the
    resident memory does not grow with the rows that were seen.  Both files are opened at once, so
    that removing them later does no harm.

    Attributes:
        lengths: tokens of every row.
    """

    def __init__(self, folder: Path) -> None:
        import numpy as np
        import pyarrow as pa

        self.lengths: Sequence[int] = np.load(folder / LENGTHS, mmap_mode="r", allow_pickle=False)
        # A mapped file would stay resident page by page; a read one does not.
        self._reader = pa.ipc.open_file(pa.OSFile(str(folder / ROWS)))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, place: slice) -> list[EncodedRow]: ...

    def __getitem__(self, place: int | slice) -> EncodedRow | list[EncodedRow]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        number, inside = divmod(range(len(self))[place], BLOCK)
        [row] = _rows_of(self._reader.get_batch(number).slice(inside, 1))
        return row

    def __iter__(self) -> Iterator[EncodedRow]:
        for number in range(self._reader.num_record_batches):
            yield from _rows_of(self._reader.get_batch(number))


def row_lengths(rows: Sequence[EncodedRow]) -> Sequence[int]:
    """Tokens of every row; of cached ones without reading them."""
    return rows.lengths if isinstance(rows, CachedRows) else [len(row) for row in rows]


class RowStore:
    """Writes rows into an existing folder, in order, a few in memory at a time."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._folder, self._schema = folder, _schema()
        self._file = pa.OSFile(str(folder / ROWS), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._waiting: list[EncodedRow] = []
        self._lengths = array("i")

    def add(self, rows: Sequence[EncodedRow]) -> None:
        """Append rows.

        Raises:
            OSError: if the disk refuses.
        """
        self._waiting += rows
        self._lengths.extend(map(len, rows))
        while len(self._waiting) >= BLOCK:
            self._write(self._waiting[:BLOCK])
            del self._waiting[:BLOCK]

    def finished(self) -> CachedRows:
        """All of them, to be read."""
        import numpy as np

        if self._waiting:
            self._write(self._waiting)
        self._writer.close()
        self._file.close()
        np.save(self._folder / LENGTHS, np.array(self._lengths, dtype=np.int32), allow_pickle=False)
        return CachedRows(self._folder)

    def _write(self, rows: Sequence[EncodedRow]) -> None:
        import pyarrow as pa

        columns = {name: [getattr(row, name) for row in rows] for name in self._schema.names}
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))


def _schema() -> pa.Schema:
    """A column for every field of ``EncodedRow``."""
    import pyarrow as pa

    number, text = pa.int32(), pa.string()
    kinds = {
        "int": number,
        "str": text,
        "list[int]": pa.list_(number),
        "tuple[str, ...]": pa.list_(text),
        "tuple[tuple[int, int], ...]": pa.list_(pa.list_(number)),
    }
    return pa.schema([(item.name, kinds[str(item.type)]) for item in fields(EncodedRow)])


def _rows_of(batch: pa.RecordBatch) -> Iterator[EncodedRow]:
    columns = (_values(name, batch.column(name).to_pylist()) for name in batch.schema.names)
    return (EncodedRow(*values) for values in zip(*columns, strict=True))


def _values(name: str, column: list[Any]) -> list[Any]:
    """Lists as ``EncodedRow`` has them: ids stay a list, everything else is a tuple."""
    if name == "input_ids" or not column or not isinstance(column[0], list):
        return column
    if name in _NESTED:
        return [tuple(map(tuple, value)) for value in column]
    return [tuple(value) for value in column]
