"""A run that continues an adapter: what the file decides is refused otherwise, and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.command_line import CommandLine

SHORT = ("recipe=smoke", "stages=[train]", "trainer.steps=2")


@pytest.fixture
def first(cli: CommandLine) -> str:
    """An adapter of rank 4 on the values alone."""
    cli.succeeds("train", *SHORT, "adapter.rank=4", "targets.modules=[v_proj]", "out=first")
    return "adapter_path=first/adapter"


def test_the_recipe_records_what_was_trained(cli: CommandLine, first: str) -> None:
    cli.succeeds("train", *SHORT, first, "adapter.lr=1e-3", "out=second")
    record = yaml.safe_load(Path("second/recipe.yaml").read_text())
    assert record["adapter"]["rank"] == 4 and record["adapter"]["alpha"] is None
    assert record["targets"]["modules"] == ["v_proj"]
    assert record["adapter"]["lr"] == 1e-3
    assert json.loads(Path("second/adapter/adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("adapter.rank=16", "adapter.rank=16 cannot hold: the adapter to continue has 4"),
        ("adapter.rank=8", "adapter.rank=8 cannot hold"),
        ("adapter.alpha=32", "adapter.alpha=32"),
        ("targets.modules=[q_proj]", "targets.modules=['q_proj'] cannot hold"),
        ("targets=all_linear", "targets.modules=all_linear cannot hold"),
    ],
)
def test_a_setting_that_cannot_hold_is_refused(
    cli: CommandLine, first: str, word: str, said: str
) -> None:
    error = cli.refuses("train", *SHORT, first, word, "out=second")
    assert said in error and "error[2]" in error
    assert not Path("second").exists()


def test_a_recipe_file_that_sets_another_rank_is_refused(cli: CommandLine, first: str) -> None:
    Path("recipes/recipe").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [smoke, _self_]\nadapter: {rank: 16}\n"
    Path("recipes/recipe/mine.yaml").write_text(text)
    words = ("recipe=mine", "stages=[train]", "trainer.steps=2", first, "out=second")
    assert "adapter.rank=16 cannot hold" in cli.refuses("train", *words)


def test_the_same_setting_is_no_contradiction(cli: CommandLine, first: str) -> None:
    cli.succeeds("train", *SHORT, first, "adapter.rank=4", "targets.modules=[v_proj]", "out=again")


@pytest.mark.parametrize("again", ["resume=second", "resume=auto"])
def test_a_continued_run_is_resumed_without_drift(cli: CommandLine, first: str, again: str) -> None:
    words = (*SHORT, first, "out=second")
    cli.succeeds("train", *words)
    Path("second/summary.json").unlink()
    cli.succeeds("train", *((again,) if again == "resume=second" else (*words, again)))


def test_a_run_that_recorded_another_rank_is_resumed_as_it_was(
    cli: CommandLine, first: str
) -> None:
    cli.succeeds("train", *SHORT, first, "out=second")
    recipe = Path("second/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("rank: 4", "rank: 8"))
    assert "already complete" in cli.succeeds("train", "resume=second").out
