"""Tables on terminals of any width: upright, on their side where that helps, never an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratune.console import console
from loratune.tables import Table, facts, show

COUNTS = Table(
    "counts",
    ("variant", "rank", "trainable", "frozen", "stored", "bytes"),
    tuple((name, 8, 73_728, 0, 294_912, 589_824) for name in ("lora", "vera")),
)
LONG = Table(
    "settings", ("setting", "value", "set by"), tuple((f"key{n}", n, "recipe") for n in range(40))
)


@pytest.mark.parametrize("width", [20, 40, 60, 200])
@pytest.mark.parametrize(
    "table", [COUNTS, LONG, facts([("device", "cpu")]), Table("", ("a",), ((1,),), numeric=(True,))]
)
def test_every_table_is_shown_at_every_width(
    table: Table, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console(), "width", width)
    show(table)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("width", "first"), [(200, "variant"), (40, "rank")])
def test_a_table_lies_on_its_side_where_that_makes_it_fit(
    width: int, first: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console(), "width", width)
    show(COUNTS)
    head = capsys.readouterr().out
    assert head.index(first) < head.index("73,728")
    assert ("variant" in head) == (width == 200)


def test_a_table_that_fits_neither_way_comes_in_parts_with_every_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console(), "width", 60)
    names = ("lora", "vera", "lora_fa", "lora_plus", "other")
    many = replace(
        COUNTS,
        rows=tuple((name, 8, *(10**9 + place,) * 4) for place, name in enumerate(names)),
        marked=frozenset({0, 4}),
    )
    show(many)
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert all(f"{10**9 + place:,}" in text and name in text for place, name in enumerate(names))
    assert max(map(len, lines)) <= 60 and text.count("trainable") > 1


def test_many_rows_stay_upright_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console(), "width", 16)
    show(LONG)
    assert len(capsys.readouterr().out.splitlines()) >= 40
