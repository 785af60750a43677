"""``loratune plan`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratune.cli.dispatch import dispatch
from loratune.errors import ConfigError
from loratune.plan.fit import parse_size
from loratune.plan.memory import ERROR_BAR


def planned(capsys, *words: str) -> dict:
    capsys.readouterr()
    code = dispatch("plan", [*words, "format=json"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    content: dict = json.loads(captured.out)
    return content


def test_the_table_says_steps_memory_disk_and_time_and_leaves_nothing_behind(capsys):
    assert dispatch("plan", ["recipe=demo"]) == 0
    out = capsys.readouterr().out
    assert "150 steps = 25.00 passes" in out
    assert "peak memory (± 25%)" in out
    assert "disk: checkpoints" in out and "merged model" in out
    assert "time: about" in out
    assert "recipe/demo.yaml" in out
    assert not list(Path().iterdir())


def test_no_model_weight_is_read(capsys, monkeypatch):
    from loratune.models import load as base_model

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(base_model, "load_model", refuse)
    assert planned(capsys, "recipe=demo")["time"]["training"] > 0


def test_fit_changes_the_micro_batch_before_anything_else(capsys):
    words = ("recipe=demo", "trainer.batch_size=32", "time=false")
    whole = planned(capsys, *words)["memory"]
    process = whole["process"]
    # Room for the fixed part and half of what grows with the batch.
    room = (whole["peak"] - 0.5 * (whole["activations"] + whole["working"])) * (1 + ERROR_BAR)
    plan = planned(capsys, *words, f"fit={int(room)}")
    chosen = dict(word.split("=") for word in plan["fit"]["overrides"])
    assert set(chosen) == {"trainer.batch_size", "trainer.grad_accum_steps"}
    assert int(chosen["trainer.batch_size"]) * int(chosen["trainer.grad_accum_steps"]) == 32
    assert plan["memory"]["peak"] * (1 + ERROR_BAR) <= room
    # The words do what they say: the recipe with them is the recipe that was planned.
    again = planned(capsys, *words, *plan["fit"]["overrides"])
    assert again["memory"]["activations"] == plan["memory"]["activations"]
    assert process > 0


def test_what_fits_is_left_alone(capsys):
    assert planned(capsys, "recipe=demo", "time=false", "fit=100GB")["fit"]["overrides"] == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["fit=lots"], 2, "'lots' is not a size"),
        (["fit=0GB"], 2, "allows nothing"),
        (["fit=2MB", "time=false"], 2, "nothing fits into 2 MB"),
        (["format=xml"], 2, "format must be one of table, json"),
        (["ftt=1GB"], 2, "did you mean 'fit'?"),
        (["data.path=nope.jsonl", "time=false"], 3, "no file 'nope.jsonl'"),
        (["targets.modules=[nope]", "time=false"], 4, "'nope' matches no layer"),
    ],
    ids=str,
)
def test_bad_words_get_one_line_and_an_exit_code(words, code, said, capsys):
    got = dispatch("plan", ["recipe=demo", *words])
    err = capsys.readouterr().err
    assert got == code
    assert said in err and err.startswith(f"error[{code}]") and err.count("\n") == 1


def test_a_model_that_is_not_here_is_planned_from_its_numbers(capsys):
    words = ("model=opt_6_7b", "targets=attention_qv", "time=false", "data.path=null")
    plan = planned(capsys, *words)
    bytes_per_weight = 4 if plan["dtype"] == "float32" else 2
    assert plan["memory"]["weights"] == 6_658_473_984 * bytes_per_weight
    assert any("no rows are named" in warning for warning in plan["warnings"])


def test_doubtful_settings_are_told(capsys):
    words = ("recipe=demo", "time=false", "trainer.warmup_steps=150", "trainer.eval_every=0")
    said = " ".join(planned(capsys, *words)["warnings"])
    assert "warm-up takes all 150 steps" in said
    assert "25 passes over the same rows" in said
    assert "the last adapter is kept, not the best" in said


def test_sizes_are_read_in_decimal_and_binary_units():
    assert parse_size("24GB") == 24 * 10**9
    assert parse_size("1.5 GiB") == 3 * 2**29
    assert parse_size("900") == 900
    with pytest.raises(ConfigError):
        parse_size("-1GB")
