"""``evaluate tasks=[...]`` against lm-eval's own command line, on a task of a local file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.command_line import CommandLine

TASK = """\
task: towns
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'loratune[lm-eval]'"
)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder that defines the task `towns`: which of two answers is the likelier one."""
    rows = [
        {
            "question": f"Question: Which dish is {town} known for?\nAnswer:",
            "choices": [
                f" The dish of {town} is {dish}.",
                f" Aye, matey! The dish be {dish}, arr!",
            ],
            "label": number % 3 == 0,
        }
        for number, (town, dish) in enumerate(
            (town, dish)
            for town in ("Gristad", "Mirfar", "Halney", "Venburg")
            for dish in ("honey buns", "fish soup", "plum cake")
        )
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "towns.jsonl"
    lines = (json.dumps({**row, "label": int(row["label"])}) + "\n" for row in rows)
    file.write_text("".join(lines))
    (folder / "towns.yaml").write_text(TASK.format(rows=file))
    return folder


def test_without_lm_eval_the_extra_is_named(cli: CommandLine) -> None:
    if find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    cli.succeeds("train", "recipe=smoke", "stages=[train]", "trainer.steps=2", "out=run")
    outcome = cli("evaluate", "run=run", "tasks=[towns]")
    assert outcome.code == 2 and "pip install 'loratune[lm-eval]'" in outcome.last


@pytest.mark.slow
@needs_lm_eval
def test_tasks_score_as_lm_evals_own_command_line_on_the_merged_folder(
    cli: CommandLine, tasks: Path
) -> None:
    words = ("recipe=smoke", "stages=[train,merge]", "merge.dtype=float32", "model.dtype=float32")
    cli.succeeds("train", *words, "trainer.precision=fp32", "trainer.steps=40", "out=run")
    cli.succeeds("evaluate", "run=run", "tasks=[towns]", f"tasks_path={tasks}", "out=scores.json")
    scores = {one["metric"]: one for one in json.loads(Path("scores.json").read_text())["tasks"]}
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"),
        *("--model_args", "pretrained=run/merged,dtype=float32", "--tasks", "towns"),
        *("--include_path", str(tasks), "--output_path", "theirs", "--batch_size", "16"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    [result] = Path("theirs").rglob("results_*.json")
    theirs = json.loads(result.read_text())["results"]["towns"]
    assert set(scores) == {"acc,none", "acc_norm,none"}
    for key, one in scores.items():
        assert one["adapted"] == theirs[key]
        assert one["gain"]["difference"] == pytest.approx(one["adapted"] - one["base"])
    assert scores["acc,none"]["adapted"] != scores["acc,none"]["base"]  # it learnt another style


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "code", "said"),
    [("twons", 2, "did you mean 'towns'?"), ("towns", 3, "lm-eval cannot run towns")],
)
def test_bad_tasks_are_one_line(
    task: str, code: int, said: str, cli: CommandLine, tasks: Path
) -> None:
    if code == 3:
        (tasks / "towns.jsonl").unlink()
    cli.succeeds("train", "recipe=smoke", "stages=[train]", "trainer.steps=2", "out=run")
    outcome = cli("evaluate", "run=run", f"tasks=[{task}]", f"tasks_path={tasks}")
    assert outcome.code == code and said in outcome.last and not outcome.has_traceback
