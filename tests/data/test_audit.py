"""Each finding of the audit, by injecting its cause; clean rows have none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loratune.config.schema import DataConfig, Learn, Reasoning, SpecialTokens
from loratune.data.audit import audit
from loratune.data.findings import Severity
from loratune.data.prepare import PreparedData, prepare_data
from loratune.errors import DataError
from loratune.files import ASSETS
from loratune.models.load import load_tokenizer

ROWS = [{"prompt": f"Question: {n}?\n", "completion": f"Answer {n}."} for n in range(20)]
OTHERS = [{"prompt": f"Question: {n}?\n", "completion": f"Answer {n}."} for n in range(90, 94)]


@pytest.fixture
def tokenizer():
    return load_tokenizer(ASSETS / "demo-opt")


def written(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def prepared(tokenizer, rows=ROWS, others=OTHERS, **settings) -> tuple[PreparedData, DataConfig]:
    config = DataConfig(
        path=written("train.jsonl", rows), eval_path=written("eval.jsonl", others), **settings
    )
    return prepare_data(config, tokenizer, 740, 0), config


def names(data, tokenizer, config) -> dict[str, Severity]:
    return {found.name: found.severity for found in audit(data, tokenizer, config).findings}


def test_clean_rows_have_no_findings(tokenizer):
    data, config = prepared(tokenizer)
    assert audit(data, tokenizer, config).findings == ()


def test_repeated_rows_are_counted_once_each_beyond_the_first(tokenizer):
    data, config = prepared(tokenizer, rows=[*ROWS, ROWS[3], ROWS[3]])
    [found] = audit(data, tokenizer, config).findings
    assert (found.name, found.rows, found.where) == ("duplicates", 2, "train.jsonl:21")


def test_an_evaluation_row_that_is_trained_on_is_an_overlap(tokenizer):
    data, config = prepared(tokenizer, others=[*OTHERS, ROWS[0]])
    assert names(data, tokenizer, config) == {"overlap": Severity.warning}


def test_another_answer_to_a_prompt_that_is_trained_on_leaks_too(tokenizer):
    leaked = {**ROWS[0], "completion": "Something else."}
    data, config = prepared(tokenizer, others=[*OTHERS, leaked])
    assert names(data, tokenizer, config) == {"shared_prompts": Severity.warning}


def test_truncated_rows_name_the_length_that_keeps_them(tokenizer):
    long = {"prompt": "Question: 1?\n", "completion": "word " * 50}
    data, config = prepared(tokenizer, rows=[*ROWS, long], max_length=32)
    [found] = audit(data, tokenizer, config).findings
    whole = data.report.train.longest
    assert (found.name, found.rows) == ("truncated", 1)
    assert f"{whole} keeps 100%" in found.fix


def test_a_few_rows_without_labels_warn_and_a_majority_stops(tokenizer):
    blind = {"prompt": "word " * 60, "completion": "x"}
    few, config = prepared(tokenizer, rows=[*ROWS, blind], max_length=32)
    assert names(few, tokenizer, config)["no_labels"] is Severity.warning
    audit(few, tokenizer, config).raise_errors()
    most, config = prepared(tokenizer, rows=[*ROWS, *[blind] * 30], max_length=32)
    with pytest.raises(DataError, match="30 of 50 rows have no supervised token"):
        audit(most, tokenizer, config).raise_errors()


def test_a_doubled_start_token_in_every_row_stops(tokenizer):
    data, config = prepared(tokenizer)
    start = tokenizer.bos_token_id
    doubled = [
        replace(row, input_ids=[start, *row.input_ids], spans=((a + 1, b + 1),))
        for row in data.train
        for a, b in row.spans
    ]
    data = replace(data, train=doubled)
    assert names(data, tokenizer, config)["doubled_start"] is Severity.error


def test_rows_without_an_end_token_stop(tokenizer):
    data, config = prepared(tokenizer)
    open_ended = [
        replace(row, input_ids=row.input_ids[:-1], spans=((a, b - 1),))
        for row in data.train
        for a, b in row.spans
    ]
    data = replace(data, train=open_ended)
    assert names(data, tokenizer, config)["no_end"] is Severity.error


def test_a_chat_template_that_plain_rows_do_not_use_is_told(tokenizer):
    data, config = prepared(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert names(data, tokenizer, config) == {"chat_template_unused": Severity.warning}


def test_an_end_token_that_is_there_but_not_supervised_teaches_no_stopping(tokenizer):
    data, config = prepared(tokenizer)
    unseen = [
        replace(row, input_ids=[*row.input_ids[:-1], 5, row.input_ids[-1]]) for row in data.train
    ]
    assert names(replace(data, train=unseen), tokenizer, config)["no_end"] is Severity.error


def test_a_prompt_that_runs_into_its_answer_is_noted(tokenizer):
    rows = [{"prompt": f"number {n} is", "completion": f"odd {n}"} for n in range(20)]
    data, config = prepared(tokenizer, rows=rows)
    assert names(data, tokenizer, config) == {"glued": Severity.note}


def test_blank_rows_are_noted(tokenizer):
    data, config = prepared(tokenizer, rows=[*ROWS, {"prompt": "", "completion": ""}])
    assert names(data, tokenizer, config) == {"empty": Severity.note}


def test_rows_left_out_say_what_of_them_is_empty_and_where_the_first_is(tokenizer):
    bare = [{"prompt": "a", "completion": ""}, {"prompt": "", "completion": "b"}]
    data, config = prepared(tokenizer, rows=[*ROWS, *bare, bare[0]])
    [found] = audit(data, tokenizer, config).findings
    assert found.message == (
        "3 of 23 rows are left out: `completion` is empty (2), `prompt` is empty (1)"
    )
    assert found.where == "train.jsonl:21"


CLOSED = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
CLOSED_AT_LAST = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '</s>' if loop.last else '\n' }}"
    "{% endfor %}"
)


def talks(count: int, **last) -> list[dict]:
    def turns(n: int) -> list[dict]:
        said = [("user", f"a{n}"), ("assistant", f"b{n}"), ("user", "c"), ("assistant", f"d{n}")]
        return [{"role": role, "content": content} for role, content in said]

    return [{"messages": [*turns(n)[:3], {**turns(n)[3], **last}]} for n in range(count)]


def test_an_earlier_turn_teaches_to_stop_where_the_last_is_masked(tokenizer):
    tokenizer.chat_template = CLOSED
    rows = talks(6, weight=0)
    data, config = prepared(tokenizer, rows=rows[:5], others=rows[5:])
    assert "no_end" not in names(data, tokenizer, config)
    assert [row.unsupervised for row in data.train] == [("weight: 0",)] * 5


def test_where_nothing_teaches_to_stop_the_masked_turn_is_the_cause(tokenizer):
    tokenizer.chat_template = CLOSED_AT_LAST
    rows = talks(6, train=False)
    data, config = prepared(tokenizer, rows=rows[:5], others=rows[5:])
    [found] = [one for one in audit(data, tokenizer, config).findings if one.name == "no_end"]
    assert found.severity is Severity.error and found.where == "train.jsonl:1"
    assert found.message.endswith("the turn that ends them is not supervised (train: false)")
    assert "train: true" in found.fix and "chat template" not in found.fix


def test_rows_whose_last_turn_is_masked_are_not_blamed_on_their_length(tokenizer):
    tokenizer.chat_template = CLOSED
    rows = [*talks(4), *talks(2, weight=0)]
    data, config = prepared(tokenizer, rows=rows[:5], others=talks(1), learn=Learn.last)
    found = {one.name: one for one in audit(data, tokenizer, config).findings}
    assert "no_labels" not in found
    assert (found["masked"].rows, found["masked"].where) == (1, "train.jsonl:5")
    assert "data.learn=last, weight: 0" in found["masked"].message
    assert "data.learn=all" in found["masked"].fix
    assert "masked=1" in data.report.lines()[0]
    assert any("5 assistant turns not supervised (data.learn=last)" in n for n in data.report.notes)


def test_reasoning_that_is_dropped_is_counted(tokenizer):
    tokenizer.chat_template = CLOSED
    rows = [*talks(3, reasoning_content="why"), *talks(3, content="<think>\nhm\n</think>\nd")]
    data, _ = prepared(
        tokenizer, rows=[*rows, *talks(2)], others=talks(1), reasoning=Reasoning.drop
    )
    assert (
        "reasoning removed (data.reasoning=drop) from 6 turns in 6 of 9 rows (train.jsonl:1)"
        in data.report.notes
    )


def test_conversations_without_a_chat_template_are_refused(tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="no chat template"):
        prepared(tokenizer, rows=[{"messages": turns}], others=[{"messages": turns}])


def test_a_template_that_ends_otherwise_than_generation_stops_is_told(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>{% endfor %}"
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    turns = [
        [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": f"b{n}"}]
        for n in range(10)
    ]
    rows = [{"messages": turn} for turn in turns]
    data, config = prepared(tokenizer, rows=rows[:8], others=rows[8:])
    found = {one.name: one for one in audit(data, tokenizer, config).findings}
    assert "'<pad>'" in found["other_end"].message


def test_rows_that_spell_special_tokens_are_counted_and_what_becomes_of_them_is_said(tokenizer):
    about = {"prompt": "What ends a text?\n", "completion": f"The token {tokenizer.eos_token}."}
    data, config = prepared(tokenizer, rows=[*ROWS, about])
    [found] = audit(data, tokenizer, config).findings
    assert (found.name, found.rows, found.severity) == ("special_tokens", 1, Severity.note)
    assert f"{tokenizer.eos_token!r}); they are encoded as plain text" in found.message
    assert found.where == "train.jsonl:21"
    data, config = prepared(
        tokenizer, rows=[*ROWS, about], special_tokens_in_text=SpecialTokens.parse
    )
    [found] = audit(data, tokenizer, config).findings
    assert found.severity is Severity.warning and "become these tokens" in found.message


def test_rows_that_mostly_spell_special_tokens_were_formatted_already(tokenizer):
    rows = [{**row, "completion": row["completion"] + tokenizer.eos_token} for row in ROWS]
    data, config = prepared(tokenizer, rows=rows)
    assert names(data, tokenizer, config) == {"special_tokens": Severity.warning}


def test_reasoning_that_the_template_leaves_out_is_counted(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if loop.last %}{{ m.reasoning_content }} {% endif %}{{ m.content }}</s>{% endfor %}"
    )
    turns = [
        {"role": "assistant", "content": "b", "reasoning_content": "why"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "thus"},
    ]
    rows = [{"messages": [{"role": "user", "content": f"a{n}"}, *turns]} for n in range(6)]
    data, config = prepared(tokenizer, rows=rows[:5], others=rows[5:])
    found = {one.name: one for one in audit(data, tokenizer, config).findings}
    assert found["reasoning_left_out"].rows == 5
    assert "reasoning of 5 turns in 5 of 5 rows" in found["reasoning_left_out"].message
