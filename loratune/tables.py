"""One table for every medium: terminal, Markdown, CSV and HTML; text in it stays text."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratune.console import console, printable
from loratune.units import NOTHING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Cell = str | int | float | None
_PARTED_ROWS = 12
"""Rows of the longest table that is cut into parts to lie on its side."""
_LINE = 110
_NUMBER = re.compile(r"[<±+\-−]?\s?\d")


@dataclass(frozen=True)
class Table:
    """A titled table; numbers stay numbers until something prints them.

    Attributes:
        title: what it is, where nothing else says so.
        columns: headings.
        rows: cells; ``None`` is a number that is not there, and a line break parts a value from
            what qualifies it.
        formats: heading to how the numbers below it are written for people.
        numeric: which columns are aligned right; by default those after the first that hold
            numbers for the most part.
        caption: how to read it.
        marked: numbers of the rows to stress.
        ruled: whether a terminal draws a line between the rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    formats: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)
    numeric: tuple[bool, ...] | None = None
    caption: str = ""
    marked: frozenset[int] = frozenset()
    ruled: bool = False

    def texts(self) -> list[tuple[str, ...]]:
        """The rows as people read them."""
        return [
            tuple(self._text(name, cell) for name, cell in zip(self.columns, row, strict=True))
            for row in self.rows
        ]

    def _text(self, column: str, cell: Cell) -> str:
        if cell is None:
            return NOTHING
        if isinstance(cell, str):
            return printable(cell)
        if column in self.formats:
            return self.formats[column](cell)
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    def aligned_right(self) -> tuple[bool, ...]:
        """For each column whether it holds numbers."""
        if self.numeric is not None:
            return self.numeric
        return tuple(number > 0 and _are_numbers(texts) for number, texts in self._columns())

    def _columns(self) -> Iterator[tuple[int, list[str]]]:
        texts = self.texts()
        return ((place, [row[place] for row in texts]) for place in range(len(self.columns)))

    def transposed(self) -> Table:
        """Rows as columns, named by their first cells."""
        names = tuple(row[0] for row in self.texts())
        rows = tuple((self.columns[place], *texts) for place, texts in self._columns() if place)
        return replace(self, columns=("", *names), rows=rows, numeric=None, marked=frozenset())

    def to_csv(self) -> str:
        """Header and rows; numbers as they are, empty where there is none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow(c.replace("\n", " ") if isinstance(c, str) else c for c in row)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A GitHub table between its title and its caption; numbers are aligned right."""
        lines = [[markdown_text(name) for name in self.columns]]
        lines += [["---:" if right else "---" for right in self.aligned_right()]]
        for number, row in enumerate(self.texts()):
            first, *others = map(markdown_text, row)
            lines.append([f"**{first}**" if number in self.marked else first, *others])
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts = [markdown_text(self.title), body, markdown_text(self.caption)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_html(self) -> str:
        """A table element in a box that scrolls, below its caption; everything is escaped."""
        right = [' class="n"' if numeric else "" for numeric in self.aligned_right()]
        parts = [f'<p class="note">{_escaped(self.caption)}</p>'] if self.caption else []
        label = _escaped(self.caption or self.title or "table")
        parts.append(f'<div class="scroll" tabindex="0" role="group" aria-label="{label}"><table>')
        if any(self.columns):
            cells = zip(right, map(_escaped, self.columns), strict=True)
            heads = "".join(f'<th scope="col"{style}>{name}</th>' for style, name in cells)
            parts.append(f"<thead><tr>{heads}</tr></thead>")
        parts.append("<tbody>")
        for number, (first, *others) in enumerate(self.texts()):
            style = ' class="marked"' if number in self.marked else ""
            cells = zip(right[1:], map(_escaped, others), strict=True)
            body = "".join(f"<td{right_style}>{text}</td>" for right_style, text in cells)
            parts.append(f'<tr{style}><th scope="row">{_escaped(first)}</th>{body}</tr>')
        return "\n".join([*parts, "</tbody></table></div>"])

    def to_rich(self) -> RichTable:
        """A table for the terminal; nothing in it is read as markup."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(printable(self.title)),
            title_justify="left",
            caption=Text(self.caption) if self.caption else None,
            caption_justify="left",
            show_lines=self.ruled,
        )
        share = _LINE // len(self.columns) - 3 if any(self.aligned_right()) else 0
        for (place, texts), right in zip(self._columns(), self.aligned_right(), strict=True):
            # Headers wrap where a line is short; a number never does, nor does a word of text
            # beside numbers, up to its fair share of the line.
            widest = max((len(word) for text in texts for word in text.split()), default=0)
            table.add_column(
                Text(self.columns[place]),
                justify="right" if right else "left",
                overflow="fold",
                min_width=widest if right else min(widest, share),
            )
        for number, row in enumerate(self.texts()):
            style = "bold" if number in self.marked else ""
            table.add_row(*map(Text, row), style=style)
        return table


def facts(pairs: Sequence[tuple[str, str]]) -> Table:
    """Names and values below each other."""
    return Table("", ("", ""), tuple(pairs), numeric=(False, False))


def show(table: Table) -> None:
    """Print a table; on its side, in parts if need be, where the terminal is too narrow for it."""
    room = console().options.update_width(1000)  # measuring never answers more than that
    upright, on_its_side = table.to_rich(), table.transposed().to_rich()
    wide, narrow = (console().measure(t, options=room).minimum for t in (upright, on_its_side))
    if narrow > console().width and wide > console().width and 1 < len(table.rows) <= _PARTED_ROWS:
        for part in _halves(table):
            show(part)
    else:
        console().print(on_its_side if narrow <= console().width < wide else upright)


def _halves(table: Table) -> tuple[Table, Table]:
    """The first and the last rows of a table, each as one."""
    half = (len(table.rows) + 1) // 2
    marked = frozenset(number - half for number in table.marked if number >= half)
    first = replace(
        table,
        rows=table.rows[:half],
        caption="",
        marked=frozenset(number for number in table.marked if number < half),
    )
    return first, replace(table, title="", rows=table.rows[half:], marked=marked)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no line breaks."""
    plain = html.escape(" ".join(printable(text).split()), quote=False)
    # An underscore between letters or digits is never emphasis, an interval never a link.
    links = r"\[(?![\d+−-])|\](?=[(\[:])"
    return re.sub(rf"[\\`*#!|]|{links}|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", plain)


def _are_numbers(texts: Sequence[str]) -> bool:
    filled = [text for text in texts if text not in ("", NOTHING)]
    return 2 * sum(_NUMBER.match(text) is not None for text in filled) > len(filled)


def _escaped(text: str) -> str:
    return html.escape(printable(text))
