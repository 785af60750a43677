"""What training says of a recipe, ``preview`` and ``plan`` say before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine
from support.tiny_models import POSITIONS, save_base, tiny_gpt2, tiny_llama

WORDS = ("recipe=smoke", "data=local", "data.eval_fraction=0", "data.path=rows.jsonl")


def write_rows(*lengths: int) -> None:
    rows = [{"prompt": "a" * length, "completion": "b"} for length in lengths]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def commands(base: Any) -> list[tuple[str, ...]]:
    save_base(Path("base"), base)
    words = (*WORDS, "model.path=base")
    return [
        ("preview", *words),
        ("plan", *words, "time=false"),
        ("train", *words, "trainer.steps=1", "evaluate.max_new_tokens=2", "out=out"),
    ]


def test_a_note_about_the_targets_is_the_same_everywhere(cli: CommandLine) -> None:
    write_rows(5, 6)
    note = "note: attention_qv adapts attn.c_attn, which holds key as well"
    for command in commands(tiny_gpt2()):
        said = cli.succeeds(*command, "targets=attention_qv")
        assert note in said.text, command[0]


def test_rows_beyond_a_table_of_positions_stop_what_looks_at_them(cli: CommandLine) -> None:
    write_rows(5, 200, 300)
    for command in commands(tiny_gpt2()):
        outcome = cli(*command, "targets=all_linear")
        assert outcome.code == 3 and not outcome.has_traceback, command[0]
        assert "rows.jsonl:2" in outcome.text
        assert f"set data.max_length={POSITIONS}" in outcome.text
        if command[0] != "train":  # which names every row
            assert f"2 rows are longer than the model's {POSITIONS} positions" in outcome.text


def test_rows_beyond_computed_positions_are_noted_everywhere(cli: CommandLine) -> None:
    write_rows(5, 200)
    line = f"note: 1 row is longer than the {POSITIONS} positions that the model was made for"
    for command in commands(tiny_llama()):
        assert line in cli.succeeds(*command, "targets=all_linear").text, command[0]


@pytest.mark.parametrize("rows", [[5], [5, POSITIONS - 10]])
def test_rows_within_the_positions_are_not_spoken_of(cli: CommandLine, rows: list[int]) -> None:
    write_rows(*rows)
    for command in commands(tiny_llama())[:2]:
        assert "positions" not in cli.succeeds(*command, "targets=all_linear").text
