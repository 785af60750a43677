"""The rows of a recipe as they are read: one part, or one for each source of a mixture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TypeVar

from loratune.config.mixture import SOURCES, sources_of
from loratune.config.schema import DataConfig, RowFormat, SourceConfig
from loratune.data.reading import EVAL_PATH, RowsInFiles, read_rows
from loratune.data.rows import Row
from loratune.errors import DataError, LoratuneError, SeveralErrors, raise_together

Result = TypeVar("Result")
_OWN_SETTINGS = frozenset(item.name for item in fields(SourceConfig))


@dataclass(frozen=True)
class Part:
    """Rows that are written in one format.

    Attributes:
        name: of the source; empty without sources.
        config: the settings that hold for them.
        train: rows to train on, before any are split off; read again each time, if streamed.
        held_out: rows of ``data.eval_path``; a mixture's are read as its first source is.
    """

    name: str
    config: DataConfig
    train: Iterable[Row]
    held_out: list[Row]

    @property
    def rows(self) -> Iterator[Row]:
        """All of them, the training rows first."""
        return chain(self.train, self.held_out)

    @property
    def read(self) -> dict[str, Iterable[Row]]:
        """What each file gave, under the names that fingerprints have."""
        name = f"sources.{self.name}" if self.name else "train"
        sides = {name: self.train, "eval": self.held_out}
        return {name: rows for name, rows in sides.items() if any(True for _ in rows)}

    @property
    def recognises(self) -> bool:
        """Whether the format is recognised from the columns, and not set."""
        return self.config.template is None and self.config.format is RowFormat.auto


def read_parts(config: DataConfig, *, streamed: bool = False) -> list[Part]:
    """Read the rows of every source, or of ``data.path``, and those of ``data.eval_path``.

    Args:
        config: the recipe's ``data``.
        streamed: leave the training rows in their files, to be read whenever they are gone
            through.

    Raises:
        DataError: for every file that cannot be read; or there is none.
    """

    def with_rows(part: Part) -> Part:
        own = part.config
        if own.path is None:
            return part
        if streamed:
            return replace(part, train=RowsInFiles(own.path, own.split, own.limit))
        return replace(part, train=read_rows(own.path, split=own.split, limit=own.limit))

    settings = sources_of(config) or {"": config}
    parts = in_parts([Part(name, own, [], []) for name, own in settings.items()], with_rows)
    if config.eval_path is not None:
        held_out = read_rows(
            config.eval_path, split=config.split, limit=config.eval_limit, key=EVAL_PATH
        )
        parts[0] = replace(parts[0], held_out=held_out)
    if not any(True for part in parts for _ in part.rows):
        raise DataError("no data", where="data.path", fix="set data.path to a file of rows")
    return parts


def in_parts(parts: Sequence[Part], work: Callable[[Part], Result]) -> list[Result]:
    """``work`` on every part.

    Raises:
        LoratuneError: what stopped it, of all parts together; each says which source it means.
    """
    results, errors = [], list[LoratuneError]()
    for part in parts:
        try:
            results.append(work(part))
        except LoratuneError as error:
            _name_source(error, part.name)
            errors.append(error)
    raise_together(errors)
    return results


def _name_source(error: LoratuneError, name: str) -> None:
    """``data.columns.prompt`` of a source becomes ``data.sources.NAME.columns.prompt``."""
    for one in error.errors if isinstance(error, SeveralErrors) else [error]:
        key = re.match(r"data\.?(\w*)", one.where)
        if not name or key is None:
            continue
        if key[1] in _OWN_SETTINGS:
            one.where = f"{SOURCES}.{name}.{one.where.removeprefix('data.')}"
        else:
            one.where = f"source {name}, {one.where}"
