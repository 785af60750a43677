"""Pages of run folders as they really are: whole, half, damaged, many."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loratune import files
from loratune.cli.commands.report import run as report_command
from loratune.cli.dispatch import dispatch
from loratune.errors import ConfigError, StorageError
from loratune.report.build import finished_report, write_report

from .planted import comparison, write_run


def text_of(path: Path) -> str:
    """A page's words, without markup."""
    page = re.sub("<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub("<[^>]*>", " ", page).split())


def test_a_runs_page_answers_what_how_much_and_how_sure(tmp_path: Path) -> None:
    text = text_of(write_report([write_run(tmp_path / "run", final=0.4)]))
    assert "Trained for 90 steps on rows.jsonl (95 rows)." in text
    assert "On 48 evaluation rows the loss fell from 4.2 (base) to 0.4 nats per token" in text
    assert "exact answers went from 0.0% to 75.0%" in text
    # Wilson's interval of 36 of 48
    assert "With 48 prompts, the 95 % interval of exact match is 61% to 85%" in text
    assert "The merged model was proved" in text
    for part in ("Loss against steps", "Loss against tokens", "Loss against time", "Per module",
                 "recipe.yaml", "Provenance", "Merge certificate", "Before and after"):  # fmt: skip
        assert part in text


def test_test_rows_are_called_so_and_rows_that_chose_the_step_are_named(tmp_path: Path) -> None:
    chosen = text_of(write_report([write_run(tmp_path / "a")]))
    assert "The same rows chose the best step" in chosen
    recipe = {"data": {"path": "rows.jsonl", "test_path": "test.jsonl"}}
    tested = text_of(write_report([write_run(tmp_path / "b", recipe=recipe)]))
    assert "On 48 test rows" in tested
    assert "The same rows chose" not in tested


def test_a_worse_model_is_not_called_better(tmp_path: Path) -> None:
    text = text_of(write_report([write_run(tmp_path / "run", final=5.5)]))
    assert "the loss did not fall: it went from 4.2 (base) to 5.5" in text


@pytest.mark.parametrize(
    "missing",
    ["metrics.jsonl", "timings.jsonl", "parameters.json", "data.json", "evaluation.json",
     "merged/merge_report.json", "summary.json", "provenance.json"],
)  # fmt: skip
def test_a_run_without_one_of_its_files_still_has_a_page(tmp_path: Path, missing: str) -> None:
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    assert "Trained for 90 steps" in text_of(write_report([run])) or missing == "metrics.jsonl"


def test_a_run_with_nothing_but_its_recipe_says_that_it_is_not_complete(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: demo\nadapter: {variant: vera}\n", encoding="utf-8")
    text = text_of(write_report([run]))
    assert "The run is not complete." in text
    assert "says nothing about quality" in text


def test_damaged_files_are_named_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation.json").write_text("{", encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 91, "train/lo')
    text = text_of(write_report([run]))
    assert "Damaged, and left out here: evaluation.json." in text
    assert "Trained for 90 steps" in text


def test_advice_about_the_training_stands_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    padded = "".join(json.dumps({**row, "train/fill_rate": 0.4}) + "\n" for row in rows)
    (run / "timings.jsonl").write_text(padded, encoding="utf-8")
    assert "60% of the computed tokens were padding" in text_of(write_report([run]))


def test_several_runs_are_ranked_and_their_differences_named(tmp_path: Path) -> None:
    for name, loss in (("lora", 0.4), ("vera", 0.9)):
        write_run(tmp_path / "runs" / name, variant=name, final=loss)
    text = text_of(write_report([tmp_path / "runs"], tmp_path / "all.html"))
    assert "Lowest evaluation loss: lora, 0.4 nats per token, before vera with 0.9." in text
    assert "By exact match it cannot be told from vera" in text
    assert "adapter.variant lora vera" in text
    assert "Each run is one seed" in text


def test_runs_on_different_rows_are_not_compared_in_silence(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / name, variant=name) for name in ("a", "b")]
    facts = files.read_json(runs[0] / "provenance.json")
    facts["fingerprints"]["data"] = "other"
    files.write_json(runs[0] / "provenance.json", facts)
    text = text_of(write_report(runs, tmp_path / "all.html"))
    assert "These runs have different rows: their scores do not compare." in text


def test_a_comparisons_folder_gets_its_page_beside_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files.write_json(tmp_path / "comparison.json", comparison().to_dict())
    report_command([str(tmp_path)])
    text = text_of(tmp_path / "report.html")
    assert "Choose lora" in text
    for part in (
        "Quality against trainable bytes", "Quality against memory", "Provenance",
        "Learning-rate sensitivity", "Differences in loss", "Loss against time",
    ):  # fmt: skip
        assert part in text
    assert f"report: {tmp_path}/report.html" in capsys.readouterr().out.replace("\n", "")


def test_the_page_goes_where_out_says(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report_command([str(run), f"out={tmp_path}/new/page.html"])
    assert (tmp_path / "new" / "page.html").is_file()
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "neither a run nor a comparison is here"),
        (["out=x.html"], "which folder?"),
        (["--fast"], "there is no flag '--fast'"),
        (["format=pdf"], "'format' is not a setting"),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        report_command(arguments)
    assert len(caught.value.lines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "loratune-comparison"}'])
def test_a_damaged_comparison_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "comparison.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        write_report([tmp_path])


def test_a_comparison_and_a_run_do_not_share_a_page(tmp_path: Path) -> None:
    files.write_json(tmp_path / "comparison.json", comparison().to_dict())
    with pytest.raises(ConfigError, match="page of its own"):
        write_report([tmp_path, write_run(tmp_path / "run")])


def test_a_report_that_fails_says_that_the_run_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug in a chart")

    monkeypatch.setattr("loratune.report.build.run_page", broken)
    with pytest.raises(StorageError, match="the run is complete and saved") as caught:
        finished_report(run)
    assert str(run) in str(caught.value)
    assert "loratune report" in str(caught.value)
    assert not list(run.glob(".tmp-*"))


def test_help_is_shown_without_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch("report", ["--help"]) == 0
    assert "usage: loratune report DIR..." in capsys.readouterr().out


@pytest.mark.parametrize("value", [2e-4, "NaN", 1.7e308, 5e-324, -1.0, "text", None, [1], {}])
def test_whatever_a_quantity_is_the_report_is_drawn(tmp_path: Path, value: object) -> None:
    run = write_run(tmp_path / "run")
    keys = ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "health/norm/A")
    lines = [
        json.dumps({"step": n, **{k: value for k in keys}, "train/tokens": n}) + "\n"
        for n in range(1, 800)
    ]
    (run / "metrics.jsonl").write_text("".join(lines).replace('"NaN"', "NaN"))
    assert "Trained for" in text_of(write_report([run]))


@pytest.mark.parametrize(
    "name", ["parameters.json", "data.json", "evaluation.json", "summary.json", "provenance.json"]
)
@pytest.mark.parametrize("content", ['{"variants": 3, "train": [1], "adapted": "x"}', "[]", "{"])
def test_damaged_records_are_never_a_traceback(tmp_path: Path, name: str, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    assert dispatch("report", [str(run)]) in (0, 2)


def test_a_mixture_has_a_table_and_curves_of_its_sources(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    recorded = json.loads((run / "data.json").read_text())
    side = recorded["train"]
    recorded["sources"] = [
        {"name": "task", "path": "a/task.jsonl", "weight": 3.0, "drawn": 72, "epoch": 96,
         "share": 0.75, "passes": 1.5, "train": {**side, "kept": 48}, "eval": None},
        {"name": "re<b>play", "path": "b.jsonl", "weight": 1.0, "drawn": 24, "epoch": 96,
         "share": 0.25, "passes": 0.51, "train": {**side, "kept": 47}, "eval": None},
    ]  # fmt: skip
    (run / "data.json").write_text(json.dumps(recorded))
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in steps:
        line |= {"train/loss/task": 1.25, "train/loss/re<b>play": 2.0 + line["step"] / 100}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    scores = json.loads((run / "evaluation.json").read_text())
    scores["adapted"]["source_losses"] = {"task": 0.125, "re<b>play": 3.5}
    (run / "evaluation.json").write_text(json.dumps(scores))
    page = write_report([run])
    text = text_of(page)
    assert "Trained for 90 steps on task and re&lt;b&gt;play (95 rows)." in text
    assert "Training loss of each source" in text and "Evaluation loss of each" not in text
    for words in ("task 3 75.0% 48", "1.5 1.25 – 0.125", "re&lt;b&gt;play 1 25.0% 47", "2.9 – 3.5",
                  "An epoch draws 96 rows. task: a/task.jsonl"):  # fmt: skip
        assert words in text, words
    assert "loss on task" in text and "<b>play" not in page.read_text()
    assert "each source" not in text_of(write_report([write_run(tmp_path / "plain")]))
