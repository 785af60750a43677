"""Rows of several sources: each read in its own format, split, counted, named and fingerprinted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratune.config.schema import DataConfig, SourceConfig
from loratune.data.audit import audit
from loratune.data.prepare import PreparedData, prepare_data
from loratune.errors import DataError, SeveralErrors

from .conftest import byte_level_tokenizer

Write = Callable[..., Path]
TASK = [{"prompt": f"the cat {n}", "completion": f" sat {n} times"} for n in range(40)]
GENERAL = [{"text": f"the sky is blue and the fox {n} is red", "id": n} for n in range(20)]
QUIZ = [{"question": f"what is {n}?", "answer": f"it is {n}"} for n in range(10)]


def prepared(tokenizer: Any, sources: list[SourceConfig], **options: Any) -> PreparedData:
    kept = options.pop("kept", {})
    data = DataConfig(sources=sources, **options)
    return prepare_data(data, tokenizer, len(tokenizer), 0, **kept)


@pytest.fixture
def sources(write_rows: Write) -> list[SourceConfig]:
    return [
        SourceConfig(path=str(write_rows(TASK, "task.jsonl")), weight=2),
        SourceConfig(path=str(write_rows(GENERAL, "general.jsonl"))),
        SourceConfig(
            path=str(write_rows(QUIZ, "quiz.jsonl")),
            name="questions",
            weight=0.5,
            template="Q: {question}\nA:",
            columns={"completion": "answer"},
        ),
    ]


def test_every_source_is_written_in_its_own_format(
    opt_like: Any, sources: list[SourceConfig]
) -> None:
    data = prepared(opt_like, sources)
    for name, rows, text, learnt in [
        ("task", 40, "<s>the cat 0 sat 0 times</s>", " sat 0 times</s>"),
        ("general", 20, "<s>the sky is blue and the fox 0 is red</s>", None),
        ("questions", 10, "<s>Q: what is 0?\nA:it is 0</s>", "it is 0</s>"),
    ]:
        own = [row for row in data.train if row.origin == name]
        assert len(own) == rows and opt_like.decode(own[0].input_ids) == text
        [(start, end)] = own[0].spans
        learnt = learnt or text.removeprefix("<s>")  # of general text every token
        assert opt_like.decode(own[0].input_ids[start:end]) == learnt


def test_a_mixture_of_one_file_has_the_rows_of_that_file(
    opt_like: Any, sources: list[SourceConfig]
) -> None:
    mixed = prepared(opt_like, sources[:1], eval_fraction=0.2)
    plain = prepare_data(
        DataConfig(path=sources[0].path, eval_fraction=0.2), opt_like, len(opt_like), 0
    )
    assert [replace(row, origin="") for row in mixed.train] == plain.train
    assert [replace(row, origin="") for row in mixed.eval] == plain.eval
    assert mixed.encoded == plain.encoded and mixed.prompts == plain.prompts


def test_the_counts_of_the_sources_add_up(opt_like: Any, sources: list[SourceConfig]) -> None:
    data = prepared(opt_like, sources, eval_fraction=0.1, max_length=64)
    report, parts = data.report, data.report.sources
    assert report.train is not None and report.eval is not None
    assert [part.name for part in parts] == ["task", "general", "questions"]
    assert [part.train.kept for part in parts] == [36, 18, 9]
    assert [part.eval.kept for part in parts if part.eval] == [4, 2, 1]
    assert sum(part.train.tokens for part in parts) == report.train.tokens
    assert sum(part.train.supervised_tokens for part in parts) == report.train.supervised_tokens
    assert sum(part.drawn for part in parts) == parts[0].epoch == 63
    assert [part.drawn for part in parts] == [36, 18, 9]  # 2 : 1 : 0.5
    assert [part.passes for part in parts] == [1, 1, 1]
    [line] = [line for line in report.lines() if "questions" in line and "source" in line]
    assert "9 of 9 rows" in line and "weight 0.5 = 14.3% of the rows drawn" in line
    stored = report.to_dict()["sources"][0]
    assert stored["share"] == 36 / 63 and stored["train"]["kept"] == 36


def test_evaluation_rows_of_a_file_belong_to_no_source(
    opt_like: Any, sources: list[SourceConfig], write_rows: Write
) -> None:
    held_out = str(write_rows(TASK[:5], "eval.jsonl"))
    data = prepared(opt_like, sources, eval_path=held_out)
    assert {row.origin for row in data.eval} == {""} and len(data.train) == 70
    assert all(part.eval is None for part in data.report.sources)
    assert data.report.eval is not None and data.report.eval.kept == 5


def test_columns_and_faults_are_named_with_their_source(
    opt_like: Any, sources: list[SourceConfig], write_rows: Write
) -> None:
    write_rows([*GENERAL, {"text": "word " * 300}], "general.jsonl")
    data = prepared(opt_like, sources, max_length=64)
    assert data.report.notes == ("general: columns not used: id (20 rows)",)
    found = audit(data, opt_like, DataConfig(max_length=64)).findings
    [cut] = [one for one in found if one.name == "truncated"]
    assert cut.message.startswith("source general: 1 of 21 training rows lose their end")


def test_the_faults_of_all_sources_are_told_at_once(
    opt_like: Any, sources: list[SourceConfig], write_rows: Write, tmp_path: Path
) -> None:
    write_rows([{"text": 5, "prompt": "x"}, {"a": 1}], "general.jsonl")
    sources[2] = replace(sources[2], columns={"completion": "anwser"})
    with pytest.raises(SeveralErrors) as caught:
        prepared(opt_like, sources)
    text = str(caught.value)
    assert f"{tmp_path}/general.jsonl:2" in text
    assert "data.sources.questions.columns.completion" in text and "did you mean 'answer'?" in text
    sources[0].path, sources[1].path = "nowhere/a.jsonl", "nowhere/b.jsonl"
    with pytest.raises(SeveralErrors) as caught:
        prepared(opt_like, sources)
    assert [one.where for one in caught.value.errors] == [
        "data.sources.a.path", "data.sources.b.path",
    ]  # fmt: skip
    assert all(isinstance(one, DataError) for one in caught.value.errors)


def test_a_source_too_long_for_the_run_is_named(
    opt_like: Any, sources: list[SourceConfig], write_rows: Write
) -> None:
    write_rows([{"prompt": "word " * 300, "completion": "x"}] * 3, "task.jsonl")
    with pytest.raises(DataError) as caught:
        prepared(opt_like, sources, max_length=64)
    assert caught.value.where == "source task, data.max_length"


def test_the_fingerprint_covers_rows_weights_and_order_but_no_place(
    opt_like: Any, sources: list[SourceConfig], write_rows: Write
) -> None:
    first = prepared(opt_like, sources)
    moved = [replace(sources[0], path=str(write_rows(TASK, "moved.jsonl")), name="task")]
    assert prepared(opt_like, [*moved, *sources[1:]]).fingerprint == first.fingerprint
    others = [
        [replace(sources[0], weight=3), *sources[1:]],
        [sources[1], sources[0], sources[2]],
        sources[:2],
        [sources[0], replace(sources[1], limit=19), sources[2]],
    ]
    prints = {prepared(opt_like, other).fingerprint for other in others}
    assert len(prints | {first.fingerprint}) == 5


def test_formats_recorded_with_an_adapter_hold_for_their_sources(
    opt_like: Any, sources: list[SourceConfig]
) -> None:
    trained = prepared(opt_like, sources, eval_fraction=0.2)
    changed = [*sources[:2], replace(sources[2], template="{question}")]
    kept = {
        "prompt_format": trained.prompt_format,
        "source_formats": dict(trained.source_formats),
    }
    assert prepared(opt_like, changed, eval_fraction=0.2, kept=kept).encoded == trained.encoded
    assert prepared(opt_like, changed, eval_fraction=0.2).encoded != trained.encoded


def test_answers_stop_where_a_chat_template_ends_them_whichever_source_has_it(
    sources: list[SourceConfig], write_rows: Write
) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = byte_level_tokenizer(start=True, pad=True, chat_template=template)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chat = SourceConfig(path=str(write_rows([{"messages": turns}] * 3, "chat.jsonl")))
    data = prepared(tokenizer, [*sources, chat])
    assert data.prompt_format.chat_template is None
    assert data.answer_format == data.source_formats["chat"]
    assert data.answer_format.chat_template == template
    assert prepared(tokenizer, sources).answer_format == data.prompt_format
