"""One table in every medium: numbers as they are for programs, formatted for people."""

from __future__ import annotations

import csv
import io
from xml.etree import ElementTree

import pytest
from rich.console import Console

from loratune import tables
from loratune.tables import Table, facts, markdown_text, show
from loratune.units import byte_size

TABLE = Table(
    "costs",
    ("variant", "bytes", "loss", "note"),
    (
        ("lora_fa", 294912, "0.5\n[0.4, 0.6]", "a|b"),
        ("vera", None, "0.7", "<b>&amp;\x1b[31m"),
    ),
    formats={"bytes": byte_size},
    marked=frozenset({1}),
    caption="how to read it",
)


def rich_text(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table.to_rich())
    return console.export_text()


def test_markdown_is_for_people_and_keeps_a_row_on_one_line() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "costs",
        "",
        "| variant | bytes | loss | note |",
        "| --- | ---: | ---: | --- |",
        r"| lora_fa | 295 kB | 0.5 [0.4, 0.6] | a\|b |",
        r"| **vera** | – | 0.7 | &lt;b&gt;&amp;amp;\\x1b[31m |",
        "",
        "how to read it",
    ]


def test_csv_is_for_programs() -> None:
    rows = list(csv.reader(io.StringIO(TABLE.to_csv())))
    assert rows[1] == ["lora_fa", "294912", "0.5 [0.4, 0.6]", "a|b"]
    assert rows[2][:3] == ["vera", "", "0.7"]


def test_html_escapes_aligns_and_marks() -> None:
    markup = TABLE.to_html()
    note, box = ElementTree.fromstring(f"<div>{markup}</div>")
    assert note.text == "how to read it"
    heads = [(th.text, th.get("class")) for th in box.iter("th") if th.get("scope") == "col"]
    assert heads == [("variant", None), ("bytes", "n"), ("loss", "n"), ("note", None)]
    rows = box.findall("table/tbody/tr")
    assert [row.get("class") for row in rows] == [None, "marked"]
    assert [cell.text for cell in rows[0]] == ["lora_fa", "295 kB", "0.5\n[0.4, 0.6]", "a|b"]
    assert rows[1][3].text == "<b>&amp;\\x1b[31m"


def test_a_table_without_headings_has_no_head() -> None:
    markup = facts([("steps", "30"), ("seeds", "0, 1")]).to_html()
    assert "<thead>" not in markup
    assert 'class="n"' not in markup


def test_the_terminal_shows_every_cell_and_reads_no_markup() -> None:
    text = rich_text(Table("[bold]", ("[x]", "y"), (("[red]a[/red]", 1234),)), 80)
    assert "[bold]" in text and "[x]" in text and "[red]a[/red]" in text and "1,234" in text


def test_a_table_without_rows_is_shown_in_every_medium() -> None:
    empty = Table("nothing", ("a", "b"), ())
    assert "| a | b |" in empty.to_markdown()
    assert empty.to_csv() == "a,b\n"
    assert "<tbody>" in empty.to_html()
    assert "nothing" in rich_text(empty, 80)


def test_a_table_too_wide_for_the_terminal_lies_on_its_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(width=40, record=True, file=io.StringIO())
    monkeypatch.setattr(tables, "console", lambda: console)
    wide = Table("wide", ("name", *(f"c{n}" for n in range(9))), (("a", *[1234567] * 9),))
    show(wide)
    lines = console.export_text().splitlines()
    assert any("c8" in line and "1,234,567" in line for line in lines)
    assert all(len(line) <= 40 for line in lines)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lora_fa", "lora_fa"),
        ("_x_ __y__", r"\_x\_ \_\_y\_\_"),
        ("[0.1, 0.2]", "[0.1, 0.2]"),
        ("[y](http://z)", r"\[y\](http://z)"),
        ("[1](http://z)", r"[1\](http://z)"),
        ("# a\nb", r"\# a b"),
    ],
)
def test_text_that_markdown_would_read_is_escaped(text: str, shown: str) -> None:
    assert markdown_text(text) == shown
