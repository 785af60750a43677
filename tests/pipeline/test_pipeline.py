"""The whole run through the real command line, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratune.adapters.registry import variant_names


@pytest.mark.parametrize("variant", variant_names())
def test_the_smoke_recipe_trains_evaluates_and_merges(variant, cli, tmp_path) -> None:
    cli.succeeds("train", "recipe=smoke", f"adapter={variant}", "out=run")
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "recipe.yaml", "provenance.json", "parameters.json", "metrics.jsonl", "timings.jsonl",
        "data.json", "checkpoints", "adapter", "evaluation.json", "merged", "summary.json",
    }  # fmt: skip
    assert {path.name for path in (run / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loratune.json",
    }  # fmt: skip
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train/loss"] for line in lines]
    assert len(losses) == 10 and losses[-1] < losses[0]
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["adapted"]["loss"] < scores["base"]["loss"]
    assert not [path for path in run.rglob("*") if path.name.startswith(".tmp-")]


def test_the_merged_model_answers_like_base_and_adapter_in_plain_transformers(
    cli, tmp_path
) -> None:
    from transformers import AutoModelForCausalLM

    from loratune.adapter_files.into_model import wrap_for_loading
    from loratune.adapter_files.peft_format import read_adapter
    from loratune.models.load import load_model
    from loratune.models.source import model_folder

    cli.succeeds("train", "recipe=smoke", "merge.dtype=float32", "out=run")
    ids = torch.arange(20).reshape(2, 10)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged", dtype=torch.float32)
    base = load_model(model_folder("builtin:demo-opt"), torch.float32)
    before = base(ids).logits
    wrap_for_loading(base, read_adapter(tmp_path / "run/adapter"))
    base.eval()
    assert not torch.allclose(base(ids).logits, before, atol=1e-3)
    torch.testing.assert_close(merged(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)


def test_later_commands_work_from_the_run_folder_alone(cli, tmp_path) -> None:
    cli.succeeds("train", "recipe=smoke", "stages=[train]", "out=run")
    limits = ["evaluate.generate_limit=2", "evaluate.generate=true", "evaluate.max_new_tokens=4"]
    scores = json.loads(cli.succeeds("evaluate", "run=run", "format=json", *limits).out)
    assert scores["adapted"]["loss"] < scores["base"]["loss"]
    assert len(scores["samples"]) == 2
    question = "prompt='Question: Which country is Lunfar in?\nAnswer:'"
    answer = json.loads(cli.succeeds("generate", "run=run", question, "max_new_tokens=8").out)
    assert answer["prompt"].startswith("Question") and answer["base"] and "adapted" in answer
    cli.succeeds("merge", "run=run")
    cli.succeeds("export", "run=run", "format=portable")
    assert load_file(tmp_path / "run/export/adapter_model.safetensors")
    assert (tmp_path / "run/merged/merge_report.json").is_file()


def test_an_existing_adapter_is_continued(cli, tmp_path) -> None:
    short = ["recipe=smoke", "stages=[train]", "trainer.steps=4"]
    cli.succeeds("train", *short, "out=first")
    words = [*short, "adapter_path=first/adapter", "out=second"]
    cli.succeeds("train", *words)
    first = json.loads((tmp_path / "first/metrics.jsonl").read_text().splitlines()[-1])
    second = json.loads((tmp_path / "second/metrics.jsonl").read_text().splitlines()[0])
    assert second["train/loss"] < first["train/loss"] * 1.2
    config = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert config["r"] == 8


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["adapter.rnak=8"], 2, "did you mean 'rank'"),
        (["adapter=vear"], 2, "vera"),
        (["targets.modules=[q_proj,o_proj]"], 4, "out_proj"),
        (["data.path=nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["model.path=./nowhere"], 4, "nowhere"),
        (["data.max_length=6"], 3, "max_length"),
    ],
)
def test_bad_input_is_one_clear_line(words, code, said, cli, tmp_path) -> None:
    outcome = cli("train", "recipe=smoke", "out=run", *words)
    assert outcome.code == code
    assert said in outcome.err and not outcome.has_traceback
    assert outcome.last.startswith(f"error[{code}] ")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_rows_of_one_s_own_with_a_template_are_asked_the_same_way_later(cli, tmp_path) -> None:
    rows = [{"question": f"Which country is Town{n} in?", "reply": " Aldora"} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "recipe=smoke", "data=local", "data.path=rows.jsonl", "data.columns.prompt=question",
        "data.columns.completion=reply", "data.template='Question: {prompt}\nAnswer:'",
        "stages=[train]", "out=run",
    ]  # fmt: skip
    cli.succeeds("train", *words)
    kept = json.loads((tmp_path / "run/adapter/loratune.json").read_text())["prompt_format"]
    assert kept["template"] == "Question: {prompt}\nAnswer:"


def test_train_says_that_the_warm_up_never_ends(cli) -> None:
    words = ("recipe=smoke", "stages=[train]", "trainer.steps=2", "trainer.warmup_steps=9")
    said = "warning: warm-up takes all 2 steps: the learning rate never reaches lr"
    assert said in cli.succeeds("train", *words, "out=run").out
    assert "warm-up" not in cli.succeeds("train", *words[:-1], "out=other").out
