"""A comparison that is taken up on another day writes its rows as of the day it began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratune.compare.rows import ComparisonRows
from loratune.compare.run import compare, prepare
from loratune.compare.settings import Options
from loratune.config.schema import DataConfig, Dtype, ModelConfig, RunConfig
from loratune.errors import CheckpointError
from loratune.models.load import load_tokenizer
from loratune.models.source import model_folder

Write = Callable[[str, list[dict[str, Any]]], str]
Make = Callable[..., RunConfig]
TEMPLATE = (
    "{%% if true %%}%s {%% endif %%}{%% for m in messages %%}{{ m.role }}: {{ m.content }}\n"
    "{%% endfor %%}{%% if add_generation_prompt %%}assistant: {%% endif %%}"
)
DATED = TEMPLATE % "Today is {{ strftime_now('%d %B %Y') }}."
UNDATED = TEMPLATE % "Answer."
ONE = Options(variants=["lora"], seeds=1, lr_grid=[4e-3])


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
            ]
        }
        for number in range(start, start + count)
    ]


@pytest.fixture
def config(tiny: Make, rows: Write, tmp_path: Path) -> Callable[[str], RunConfig]:
    """A recipe of chat rows on the embedded model with a chat template of its own."""
    data = DataConfig(
        path=rows("train", chats(8)), eval_path=rows("dev", chats(3, 20)),
        test_path=rows("test", chats(3, 40)), max_length=128,
    )  # fmt: skip
    builtin = model_folder("builtin:demo-opt", None)

    def make(template: str) -> RunConfig:
        base = tmp_path / "base"
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(builtin, base)
        tokenizer = load_tokenizer(builtin)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base)
        return tiny(data=data, model=ModelConfig(path=str(base), dtype=Dtype.float32))

    return make


def on(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    monkeypatch.setattr("loratune.compare.rows.now", lambda: f"2031-12-{day}T07:05:09")


def test_every_part_is_written_as_of_the_first_day(
    config: Callable[[str], RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config(DATED)
    on(monkeypatch, "25")
    first, _ = prepare(recipe, ONE)
    assert "Today is 25 December 2031." in first.base.tokenizer.decode(first.rows.test[0].input_ids)
    on(monkeypatch, "26")
    later, _ = prepare(recipe, ONE)
    assert later.rows == first.rows
    elsewhere, _ = prepare(replace(recipe, out=f"{recipe.out}2"), ONE)
    for part in ("train", "dev", "test", "prompts"):
        assert getattr(elsewhere.rows, part) != getattr(first.rows, part)


def test_a_comparison_taken_up_the_next_day_does_nothing_again(
    config: Callable[[str], RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config(DATED)
    on(monkeypatch, "25")
    one, folder = compare(recipe, ONE)
    before = {path: path.read_bytes() for path in (folder / "members").rglob("*.json")}
    on(monkeypatch, "26")
    two, _ = compare(recipe, replace(ONE, seeds=2))
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((folder / "clock.json").read_text()) == {"clock": "2031-12-25T07:05:09"}
    assert [member.loss for member in one.variants[0].members] == [
        member.loss for member in two.variants[0].members
    ][:1]


def test_a_template_that_reads_no_clock_records_none(config: Callable[[str], RunConfig]) -> None:
    bench, plan = prepare(config(UNDATED), ONE)
    assert bench.rows.clock is None and not (plan.store.path / "clock.json").exists()


def test_a_damaged_record_of_the_time_is_named(config: Callable[[str], RunConfig]) -> None:
    recipe = config(DATED)
    _, plan = prepare(recipe, ONE)
    (plan.store.path / "clock.json").write_text('{"clock": "yesterday"}')
    with pytest.raises(CheckpointError, match="recorded time is damaged"):
        prepare(recipe, ONE)


def test_another_chat_template_is_another_comparison(config: Callable[[str], RunConfig]) -> None:
    prepare(config(UNDATED), ONE)
    with pytest.raises(CheckpointError, match="another comparison: tokenizer differ"):
        prepare(config(UNDATED.replace("Answer", "Reply")), ONE)


def test_held_out_chats_alone_stop_the_clock_too(
    config: Callable[[str], RunConfig], rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = config(DATED)
    pairs = [{"prompt": f"What is {n}?", "completion": f" {n}."} for n in range(12)]
    data = DataConfig(path=rows("pairs", pairs[3:]), eval_path=rows("others", pairs[:3]))
    held = replace(recipe.compare, heldout_path=recipe.data.eval_path)
    recipe = replace(recipe, data=data, compare=held)
    found: list[ComparisonRows] = []
    for day in ("25", "26"):
        on(monkeypatch, day)
        found.append(prepare(recipe, ONE)[0].rows)
    assert found[0] == found[1] and found[0].heldout
