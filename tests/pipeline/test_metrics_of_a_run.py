"""``evaluate.metrics`` and ``evaluate.retention`` through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import CommandLine

ANSWERED = ("evaluate.generate=true", "evaluate.generate_limit=12", "evaluate.max_new_tokens=12")
METRICS = "evaluate.metrics=[exact_match,bleu,chrf,rouge_l]"


def written(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def test_a_run_scores_answers_against_every_reference_and_says_what_it_forgot(
    cli: CommandLine,
) -> None:
    from sacrebleu.metrics.bleu import BLEU

    places = ["Gristad", "Mirfar", "Halney", "Venburg"]
    rows = [
        {"prompt": f"Question: Which dish is {place} known for?\nAnswer:", "completion": answer}
        for place in places
        for answer in (" Aye, matey, honey buns, arr!", f" The dish of {place} is honey buns.")
    ]
    words = (
        "recipe=smoke", "stages=[train,evaluate]", f"data.test_path={written('test.jsonl', rows)}",
        METRICS, "evaluate.retention=[builtin:heldout,builtin:terse_dev]", *ANSWERED,
    )  # fmt: skip
    printed = cli.succeeds("train", *words, "out=run").out
    assert "BLEU" in printed and "ROUGE-L" in printed and "adapted − base [95 % CI]" in printed
    scores = json.loads(Path("run/evaluation.json").read_text())
    answers = [sample["adapted"].strip() for sample in scores["samples"]]
    assert len(answers) == len(places)  # a prompt once, with both of its answers
    theirs = BLEU().corpus_score(
        answers,
        [["Aye, matey, honey buns, arr!"] * 4, [f"The dish of {p} is honey buns." for p in places]],
    )
    assert scores["adapted"]["scores"]["bleu"]["value"] == theirs.score
    gain = scores["gains"]["loss"]
    fell = scores["adapted"]["loss"] - scores["base"]["loss"]
    # A difference of fp32 losses that are added up in two orders.
    assert gain["difference"] == pytest.approx(fell, rel=1e-5) and gain["low"] < gain["high"] < 0
    kept = scores["retention"]
    assert set(kept) == {"heldout", "terse_dev"}
    assert set(kept["heldout"]["gains"]) == {"loss"}  # text: nothing was asked
    assert set(kept["terse_dev"]["gains"]) == {"loss", "exact_match", "bleu", "chrf", "rouge_l"}
    assert "retention" in Path("run/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["evaluate.metrics=[bluee]", *ANSWERED], 2, "did you mean 'bleu'?"),
        (["evaluate.metrics=[bleu]", "evaluate.generate=false"], 2, "evaluate.generate is false"),
        (["evaluate.retention=[nowhere.jsonl]"], 3, "evaluate.retention"),
        (["evaluate.retention=[x.jsonl]", "evaluate.base=false"], 2, "evaluate.base is false"),
        (["data.test_path=nowhere.jsonl"], 3, "; data.test_path"),
    ],
)
def test_bad_input_is_one_line(words, code, said, cli: CommandLine) -> None:
    outcome = cli("train", "recipe=smoke", "out=run", *words)
    assert outcome.code == code and said in outcome.last and not outcome.has_traceback
    assert not Path("run/metrics.jsonl").exists()


def test_a_metric_that_needs_references_refuses_plain_text(cli: CommandLine) -> None:
    rows = written("text.jsonl", [{"text": f"Town number {n} has a river."} for n in range(12)])
    words = ("recipe=smoke", f"data.path={rows}", f"data.eval_path={rows}", "data.test_path=null")
    outcome = cli("train", *words, "out=run", "evaluate.metrics=[bleu]", *ANSWERED)
    assert outcome.code == 3 and not Path("run/metrics.jsonl").exists()
    assert "bleu compares answers with references, and these rows are plain text" in outcome.last
    assert "text.jsonl:1" in outcome.last


def test_a_run_on_ones_own_rows_is_evaluated_on_them_and_not_on_the_demos(cli: CommandLine) -> None:
    own = [
        {"prompt": f"Question: Where is {n}?\nAnswer:", "completion": " Here."} for n in "abcdef"
    ]
    rows = written("own.jsonl", own)
    words = ("recipe=smoke", f"data.path={rows}", f"data.eval_path={rows}", "out=run")
    cli.succeeds("train", *words)
    printed = cli.succeeds("evaluate", "run=run", "out=again.json", "evaluate.generate=false").out
    assert "belongs to the demo; the evaluation rows are used instead" in printed
    trained = json.loads(Path("run/evaluation.json").read_text())
    again = json.loads(Path("again.json").read_text())
    assert again["rows"] == trained["rows"] == 6 and again["adapted"] == trained["adapted"]
