"""``loratune compare`` and ``loratune tune`` as a user gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.command_line import CommandLine, Outcome

from loratune.compare.result import Comparison
from loratune.models.source import model_folder

SHORT = (
    "recipe=demo", "compare.steps=5", "trainer.batch_size=4", "data.limit=16", "data.eval_limit=4",
    "compare.heldout_path=null", "compare.rungs=1", "evaluate.generate_limit=2",
    "evaluate.max_new_tokens=2", "targets=attention_qv",
)  # fmt: skip
QUICK = (*SHORT, "lr_grid=[4e-3]", "seeds=2", "variants=[lora,lora_fa]", "out=out")


def refused(found: Outcome, code: int, *words: str) -> None:
    assert found.code == code, found.text
    assert len(found.errors) == 1, found.text
    assert "Traceback" not in found.text
    for word in words:
        assert word in found.errors[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seeds=0"], ["seeds", "out of range"]),
        (["processes=0"], ["processes"]),
        (["match=size"], ["'size'", "own, rank, trainable, bytes"]),
        (["match=trainable:10"], ["lora cannot stay within 10 trained numbers"]),
        (["variants=[lorra]"], ["did you mean 'lora'"]),
        (["variants=[{variant:lora,rnak:3}]"], ["did you mean 'rank'"]),
        (["lr_grid=[]"], ["no learning rate is left"]),
        (["lr_grid=[-1e-3]"], ["not all positive rates"]),
        (["compare.dev_fraction=0"], ["compare.dev_fraction"]),
        (["compare.margin=0"], ["compare.margin", "above 0"]),
        (["variants=[lora,lora]"], ["lora_r8 and lora_r8_2 are one setting"]),
        (["part=5/4"], ["part must be K/N, not '5/4'"]),
        (["format=xml"], ["format must be one of table, md, csv, json"]),
        (["data.eval_path=null"], ["nothing to evaluate on"]),
    ],
)
def test_contradictions_are_one_line_and_code_2(
    cli: CommandLine, given: list[str], words: list[str]
) -> None:
    refused(cli("compare", *SHORT, "variants=[lora]", *given), 2, *words)


def test_a_contender_that_cannot_adapt_a_layer_is_named_before_any_trains(cli: CommandLine) -> None:
    words = ["variants=[lora,{variant:miss,rank:129}]", "out=out"]
    refused(cli("compare", *SHORT, *words), 4, "miss: model", "there are 128")
    assert not (Path.cwd() / "out").exists()


def test_parts_need_a_folder_to_share(cli: CommandLine) -> None:
    refused(cli("compare", "recipe=demo", "part=1/2"), 2, "out=DIR")


def test_rows_that_leave_none_to_choose_by_are_code_3(cli: CommandLine) -> None:
    found = cli("compare", *QUICK, "data.eval_path=builtin:test")
    refused(found, 3, "no row is left to choose the learning rate by")


def test_a_comparison_prints_what_it_writes(cli: CommandLine, tmp_path: Path) -> None:
    first = cli("compare", *QUICK)
    assert first.code == 0, first.text
    assert "differences, paired by prompt and seed" in first.out
    assert "Only 2 seeds: luck of initialisation" in first.out
    second = cli("compare", *QUICK, "format=json")
    written = (tmp_path / "out" / "comparison.json").read_text()
    assert second.out == written
    assert [v.label for v in Comparison.from_dict(json.loads(written)).variants] == [
        "lora", "lora_fa",
    ]  # fmt: skip
    third = cli("compare", *QUICK, "format=md")
    assert third.out == (tmp_path / "out" / "comparison.md").read_text()
    assert "complete: out" in third.err


def test_a_recipe_file_names_its_contenders(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "recipes" / "recipe"
    folder.mkdir(parents=True)
    (folder / "widths.yaml").write_text(
        "# @package _global_\ndefaults: [demo]\nname: widths\ncompare:\n  contenders:\n"
        "    narrow: {adapter: lora, adapter.rank: 2}\n"
        "    wide: {adapter: {variant: lora, rank: 16}}\n"
        "    mlp:\n      targets: mlp\n      trainer.batch_size: 2\n"
    )
    words = ["compare", "recipe=widths", *SHORT[1:], "lr_grid=[4e-3]", "seeds=1", "out=out"]
    words.remove("targets=attention_qv")
    first = cli(*words)
    assert first.code == 0, first.text
    typed = "+compare.contenders.third={adapter:lora,adapter.rank:3}"
    second = cli(*words, "variants=[narrow,third]", typed)
    assert second.code == 0, second.text
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(one["label"], one["costs"]["rank"]) for one in written["variants"]] == [
        ("narrow", 2), ("third", 3),
    ]  # fmt: skip
    assert len(list((tmp_path / "out" / "members").rglob("*.json"))) == 4
    refused(cli(*words, "variants=[narow]"), 2, "no adapter variant or contender named 'narow'")


def test_a_sweep_over_parts_fills_one_folder(cli: CommandLine, tmp_path: Path) -> None:
    found = cli("compare", "-m", *QUICK, "part=1/2,2/2")
    assert found.code == 0, found.text
    assert (tmp_path / "out" / "comparison.json").is_file()
    assert len(list((tmp_path / "out" / "members").rglob("*.json"))) == 4


def tuned(tmp_path: Path) -> Path:
    return tmp_path / "recipes" / "recipe" / "demo_tuned.yaml"


def test_tune_writes_a_recipe_that_train_takes(cli: CommandLine, tmp_path: Path) -> None:
    grid = ["lr_grid=[1e-5,2e-3]", "ratio_grid=[1,16]"]
    found = cli("tune", *SHORT, "adapter=lora_plus", *grid)
    assert found.code == 0, found.text
    assert "best: lr 0.002, lr_ratio 16" in found.out
    text = tuned(tmp_path).read_text()
    assert text.splitlines()[0] == "# @package _global_"
    values = yaml.safe_load(text)
    assert values["defaults"] == ["demo", {"override /adapter": "lora_plus"}]
    assert values["trainer"]["lr"] == 2e-3
    composed = cli("train", "recipe=demo_tuned", "--cfg", "job")
    assert composed.code == 0, composed.text
    recipe = yaml.safe_load(composed.out)
    assert recipe["trainer"]["lr"] == 2e-3
    assert recipe["trainer"]["steps"] == 150
    assert recipe["adapter"]["variant"] == "lora_plus"
    assert recipe["adapter"]["lr_ratio"] == 16.0
    assert recipe["data"]["path"] == "builtin:train"


def test_tune_never_writes_over_a_recipe_of_the_users_own(cli: CommandLine, tmp_path: Path) -> None:
    tuned(tmp_path).parent.mkdir(parents=True)
    tuned(tmp_path).write_text("# @package _global_\nname: mine\n")
    refused(cli("tune", *SHORT), 8, "in the way")
    assert "mine" in tuned(tmp_path).read_text()


def test_tune_says_that_no_rate_was_usable(cli: CommandLine, tmp_path: Path) -> None:
    found = cli("tune", *SHORT, "lr_grid=[1e30]")
    refused(found, 5, "no learning rate was usable", "diverged")
    assert not tuned(tmp_path).exists()


@pytest.mark.parametrize("command", ["compare", "tune"])
@pytest.mark.parametrize("out", ["base", "base/inside", "through/inside"])
def test_nothing_is_written_into_the_base(
    cli: CommandLine, tmp_path: Path, command: str, out: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("builtin:demo-opt", None), base)
    (tmp_path / "through").symlink_to(base)
    before = sorted(base.rglob("*"))
    found = cli(command, *SHORT, "lr_grid=[4e-3]", "model.path=base", f"out={out}")
    refused(found, 10, "lies inside 'base'")
    assert sorted(base.rglob("*")) == before


def test_results_are_not_put_into_the_base_that_is_the_working_folder(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder("builtin:demo-opt", None), base)
    monkeypatch.chdir(base)
    for command in ("compare", "tune", "train"):
        refused(cli(command, *SHORT, "model.path=."), 10, "lies inside")
    assert not (base / "outputs").exists() and not (base / "recipes").exists()


@pytest.mark.parametrize(("name", "what"), [("config.json", "a model"), ("recipe.yaml", "a run")])
def test_a_comparison_is_not_put_among_other_results(
    cli: CommandLine, tmp_path: Path, name: str, what: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    refused(cli("compare", *QUICK), 10, f"holds {what}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
