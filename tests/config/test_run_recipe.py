"""A run's ``recipe.yaml``, also where somebody edited it by hand: text is the word as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.config.convert import from_plain, read_recipe
from loratune.config.schema import RunConfig

RECIPE = """\
name: {word}
adapter: {{variant: lora, rank: 0x10}}
model: {{path: {word}}}
data:
  template: {word}
  columns: {{prompt: {word}, input: ""}}
  max_length: 1_000
trainer: {{lr: 1e-3, steps: 3}}
"""


@pytest.mark.parametrize("word", ["1e3", "1_000", "007", "4.50", "0x10", "'quoted'", "plain"])
def test_a_text_setting_is_the_word_and_a_number_is_a_number(word: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(word=word), encoding="utf-8")
    config = from_plain(read_recipe(path), RunConfig)
    written = word.strip("'")
    assert config.name == config.model.path == config.data.template == written
    assert config.data.columns["prompt"] == written
    assert (config.data.max_length, config.trainer.lr, config.adapter.rank) == (1000, 1e-3, 16)


@pytest.mark.parametrize("word", ["true", "no", "1.0"])
def test_words_for_true_and_false_are_words_where_text_is_wanted(word: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: {{template: {word}, eval_path: null, packing: true}}", encoding="utf-8")
    data = read_recipe(path)["data"]
    assert data == {"template": word, "eval_path": None, "packing": True}
