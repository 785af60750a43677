"""Rows to train on, to choose by and to measure on never mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loratune.compare.rows import ComparisonRows, prepare_comparison
from loratune.config.schema import (
    CompareConfig,
    DataConfig,
    RunConfig,
    SourceConfig,
    TrainerConfig,
)
from loratune.data.arrangement import Arrangement
from loratune.data.questions import question, units
from loratune.data.training_set import TrainingSet
from loratune.errors import ConfigError, DataError
from loratune.models.load import load_tokenizer
from loratune.models.source import model_folder

Write = Callable[[str, list[dict[str, Any]]], str]
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(model_folder("builtin:demo-opt", None))


def prepared(config: RunConfig, tokenizer: Any) -> ComparisonRows:
    return prepare_comparison(config, tokenizer, 740)


def pairs(count: int, answers: int = 1, start: int = 0) -> list[dict[str, str]]:
    """Rows of ``count`` prompts with several answers each."""
    return [
        {"prompt": f"Question: What is {number}?\nAnswer:", "completion": f" It is {answer}."}
        for number in range(start, start + count)
        for answer in range(answers)
    ]


def questions(rows: Any) -> set[Any]:
    return {question(row) for row in rows}


def test_the_demo_keeps_its_towns_apart(tiny: Make, tokenizer: Any) -> None:
    whole = DataConfig(
        path="builtin:train", eval_path="builtin:dev", test_path="builtin:test", max_length=64
    )
    rows = prepared(tiny(data=whole), tokenizer)
    assert (len(rows.train), len(rows.dev), len(rows.test), len(rows.prompts)) == (96, 48, 48, 48)
    assert not questions(rows.train) & questions(rows.dev)
    assert not questions(rows.dev) & questions(rows.test)
    assert not questions(rows.train) & questions(rows.test)
    assert rows.summary.notes == []


def test_without_test_rows_whole_prompts_are_set_aside_to_choose_by(
    tiny: Make, rows: Write, tokenizer: Any
) -> None:
    data = DataConfig(path=rows("train", pairs(20, 3)), eval_path=rows("eval", pairs(5, 2, 50)))
    found = prepared(tiny(data=data, compare=CompareConfig(dev_fraction=0.25)), tokenizer)
    assert len(questions(found.dev)) == 5
    assert len(found.dev) == 15
    assert len(found.train) == 45
    assert not questions(found.train) & questions(found.dev)
    assert questions(found.test) == {question(row) for row in found.test}
    assert len(found.test) == 10
    assert len(found.prompts) == 5


def test_rows_held_out_by_prompt_are_the_final_ones(
    tiny: Make, rows: Write, tokenizer: Any
) -> None:
    data = DataConfig(path=rows("train", pairs(20, 2)), eval_fraction=0.25, split_by="prompt")
    found = prepared(tiny(data=data), tokenizer)
    parts = [questions(part) for part in (found.train, found.dev, found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20


def test_dev_rows_that_ask_a_final_question_are_left_out(
    tiny: Make, rows: Write, tokenizer: Any
) -> None:
    data = DataConfig(
        path=rows("train", pairs(6)),
        eval_path=rows("dev", pairs(4, start=10)),
        test_path=rows("test", pairs(4, start=12)),
    )
    found = prepared(tiny(data=data), tokenizer)
    assert len(found.dev) == 2
    assert not questions(found.dev) & questions(found.test)
    assert found.summary.notes == ["2 dev rows ask a question of the final rows and were left out"]


def test_training_on_final_questions_is_said(tiny: Make, rows: Write, tokenizer: Any) -> None:
    data = DataConfig(
        path=rows("train", pairs(6)),
        eval_path=rows("dev", pairs(4, start=10)),
        test_path=rows("test", pairs(4, start=4)),
    )
    [note] = prepared(tiny(data=data), tokenizer).summary.notes
    assert note.startswith("2 training rows ask a question of the final rows")


def test_no_row_to_choose_by_is_a_data_error(tiny: Make, rows: Write, tokenizer: Any) -> None:
    same = rows("same", pairs(4, start=10))
    data = DataConfig(path=rows("train", pairs(6)), eval_path=same, test_path=same)
    with pytest.raises(DataError, match="no row is left to choose") as refused:
        prepared(tiny(data=data), tokenizer)
    assert refused.value.exit_code == 3


def test_one_prompt_cannot_be_split(tiny: Make, rows: Write, tokenizer: Any) -> None:
    data = DataConfig(path=rows("train", pairs(1, 9)), eval_path=rows("eval", pairs(2, start=5)))
    with pytest.raises(DataError, match="1 prompts cannot be split"):
        prepared(tiny(data=data), tokenizer)


def test_nothing_to_evaluate_on_is_a_config_error(tiny: Make, rows: Write, tokenizer: Any) -> None:
    data = DataConfig(path=rows("train", pairs(6)))
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        prepared(tiny(data=data), tokenizer)


def test_text_rows_are_units_of_their_own(tiny: Make, rows: Write, tokenizer: Any) -> None:
    texts = [{"text": f"In Sarfar the boats go down the Zenna, {n} of them."} for n in range(9)]
    data = DataConfig(path=rows("train", texts), eval_fraction=0.3)
    found = prepared(tiny(data=data), tokenizer)
    assert found.prompts == []
    assert len(units(found.test)) == len(found.test) == 3
    assert len(found.train) + len(found.dev) == 6


def test_rows_of_one_prompt_make_one_unit(tiny: Make, rows: Write, tokenizer: Any) -> None:
    data = DataConfig(
        path=rows("train", pairs(6)),
        eval_path=rows("dev", pairs(2, start=20)),
        test_path=rows("test", pairs(3, 4, 30)),
    )
    found = prepared(tiny(data=data), tokenizer)
    assert units(found.test) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_split_follows_the_seed_alone(tiny: Make, rows: Write, tokenizer: Any) -> None:
    data = DataConfig(path=rows("train", pairs(30)), eval_path=rows("eval", pairs(3, start=50)))
    config = tiny(data=data)
    first = prepared(config, tokenizer).dev
    assert prepared(config, tokenizer).dev == first
    other = replace(config, trainer=replace(config.trainer, seed=1))
    assert prepared(other, tokenizer).dev != first


def test_every_source_gives_its_share_of_the_rows_to_choose_by(
    tiny: Make, rows: Write, tokenizer: Any
) -> None:
    sizes = {"large": 40, "ten": 10, "eight": 8, "six": 6, "four": 4}
    sources = [
        SourceConfig(path=rows(name, pairs(size, 2, start=100 * n)), weight=n + 1)
        for n, (name, size) in enumerate(sizes.items())
    ]
    data = DataConfig(sources=sources, eval_path=rows("eval", pairs(4, start=80)))
    found = prepared(tiny(data=data, compare=CompareConfig(dev_fraction=0.5)), tokenizer)
    drawn = {n: len(questions(row for row in found.dev if row.origin == n)) for n in sizes}
    assert drawn == {name: size // 2 for name, size in sizes.items()}
    assert not questions(found.train) & questions(found.dev)
    assert found.summary.sources["train"] == ", ".join(source.path for source in sources)
    assert {f"recipe_sources.{name}" for name in sizes} <= set(found.summary.fingerprints)
    trainer = TrainerConfig(steps=1, batch_size=8)
    assert TrainingSet.from_config(found.train, Arrangement(1), data, trainer).sources == tuple(
        sizes
    )
