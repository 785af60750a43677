"""Rows longer than the model's positions are found before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine
from support.tiny_models import POSITIONS, save_base, tiny_gpt2, tiny_llama, tiny_opt

from loratune.data.bounds import check_positions
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import LoratuneError
from loratune.models.positions import learned_positions


def rows(*lengths: int) -> list[EncodedRow]:
    return [EncodedRow([3] * n, ((1, n),), 1, f"rows.jsonl:{k}") for k, n in enumerate(lengths, 1)]


def tiny_gptj() -> Any:
    """Its rotary positions are read from a table."""
    from transformers import GPTJConfig, GPTJForCausalLM

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "rotary_dim": 4}
    return GPTJForCausalLM(GPTJConfig(vocab_size=300, **sizes))


@pytest.mark.parametrize("model", [tiny_opt, tiny_gpt2, tiny_gptj])
def test_rows_beyond_a_table_of_positions_are_refused(model: Any) -> None:
    built = model()
    assert check_positions(built, rows(POSITIONS)) == []
    with pytest.raises(LoratuneError) as caught:
        check_positions(built, rows(9, POSITIONS + 1, 500))
    said = str(caught.value)
    assert "rows.jsonl:2" in said and "rows.jsonl:3" in said and "rows.jsonl:1" not in said
    assert f"{POSITIONS + 1} tokens, and the model has {POSITIONS} positions" in said
    assert f"data.max_length={POSITIONS}" in said


def test_rows_beyond_computed_positions_are_noted() -> None:
    model = tiny_llama()
    assert learned_positions(model) is None
    assert check_positions(model, rows(POSITIONS)) == []
    [line] = check_positions(model, rows(9, POSITIONS + 1))
    assert line.startswith("note: 1 row is longer than the 128 positions")


@pytest.mark.parametrize(("model", "code"), [(tiny_gpt2, 3), (tiny_llama, 0)])
def test_training_and_evaluation_say_it(cli: CommandLine, model: Any, code: int) -> None:
    save_base(Path("base"), model())
    short, long = ({"prompt": "a" * n, "completion": "b"} for n in (5, 200))
    for name, chosen in (("short", [short]), ("long", [short, long])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chosen * 2))
    words = ("recipe=smoke", "data=local", "data.eval_fraction=0", "model.path=base")
    train = (*words, "trainer.steps=1", "targets=all_linear", "evaluate.max_new_tokens=2")
    outcome = cli("train", *train, "data.path=long.jsonl", "out=out")
    assert outcome.code == code and not outcome.has_traceback
    cli.succeeds("train", *train, "data.path=short.jsonl", "out=good")
    later = cli("evaluate", "run=good", "data.eval_path=long.jsonl", "evaluate.max_new_tokens=2")
    assert later.code == code and not later.has_traceback
    said = "long.jsonl:2" if code else "2 rows are longer than the 128 positions"
    assert said in outcome.text and said in later.text
