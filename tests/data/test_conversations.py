"""Turns as they come: what cannot be meant is refused by name, nothing is lost without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratune.config.schema import DataConfig, Overlong, RowFormat
from loratune.data.conversations import read_tools, read_turns
from loratune.data.encode import Encoder
from loratune.data.report import turn_notes
from loratune.data.rows import Example, Message
from loratune.data.skeleton import TemplateWords, make_skeleton
from loratune.data.templates import PromptFormat, read_history
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import DataError

from .conftest import byte_level_tokenizer

TOOLS = (
    "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REVERSED = (
    "{% for m in messages[::-1] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = TOOLS.replace(
    "{{ m.tool_calls }}",
    "{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}",
)
DEEP = "[" * 100_000


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "yes", **fields}


@pytest.mark.parametrize(
    ("turn", "named"),
    [
        ({"from": "human", "value": "x", "role": "user", "content": "y"}, "`from` and `value`"),
        ({"role": "user", "content": [{"type": "text", "content": "lost"}]}, "not text"),
        ({"role": "user", "content": "x", "reasoning_content": "hm"}, "reasoning_content"),
        ({"role": "user", "content": "x", "train": True}, "train: true"),
        (assistant(reasoning_content=5), "not text"),
        (assistant(thinking=["a"]), "not text"),
        (assistant(reasoning="A", thinking="B"), "different reasoning"),
        (assistant(weight=0, train=True), "disagree"),
        (assistant(content="", tool_calls=[]), "is empty"),
        (assistant(tool_calls=[call(DEEP)]), "nested too deeply"),
        (assistant(tool_calls=[call(nested(250))]), "deeper than 100 levels"),
        (assistant(tool_calls=[call(nested(50_000))]), "deeper than 100 levels"),
        (assistant(tool_calls=[call(json.dumps(nested(100)))]), "deeper than 100 levels"),
        (assistant(name=["Ann"]), "`name of turn 1` is a list, not text"),
        (assistant(name=True), "`name of turn 1` is a bool, not text"),
        (assistant(tool_call_id={"a": 1}), "`tool_call_id of turn 1` is a dict, not text"),
        (assistant(tool_calls=[call('{"x": NaN}')]), "NaN"),
        (assistant(tool_calls=[call('{"a": 1, "a": 2}')]), "given twice"),
    ],
)
def test_a_turn_that_would_lose_something_is_refused(turn: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named) as refused:
        read_turns([turn], "messages")
    assert len(refused.value.lines()) == 1


@pytest.mark.parametrize(
    "turn",
    [
        assistant(weight=0, train=False),
        assistant(reasoning="A", thinking="A"),
        {"role": "user", "content": "x", "weight": 1, "train": False},
        assistant(tool_calls=[]),
    ],
)
def test_what_says_the_same_twice_is_taken(turn: dict[str, Any]) -> None:
    assert read_turns([turn], "messages")[0].content == turn["content"]


@pytest.mark.parametrize("read", [read_tools, read_history])
def test_json_in_a_column_is_read_as_strictly_as_rows(read: Any) -> None:
    for text in (DEEP, '[{"a": NaN}]', "[1,"):
        with pytest.raises(DataError, match="is not JSON"):
            read(text)


def test_tools_nested_too_deeply_are_refused_in_one_line() -> None:
    with pytest.raises(DataError, match="`tools` is nested deeper than 100 levels"):
        read_tools([{"name": "f", "parameters": nested(60)}])


def encode(template: str, data: DataConfig, *examples: Example) -> Any:
    tokenizer = byte_level_tokenizer(start=False, pad=True, chat_template=template)
    chosen = PromptFormat(RowFormat.messages, chat_template=template)
    encoder = Encoder(RowTokenizer(tokenizer), chosen, data)
    return encoder.encode(examples, max_length=512, overlong=Overlong.truncate)


ASKED = (Message("user", "q"), Message("assistant", "a"))


def test_special_tokens_in_definitions_of_tools_are_refused_unless_parsed() -> None:
    tools = [{"name": "f", "description": "ends with <|im_end|>"}]
    example = Example("rows.jsonl:1", messages=ASKED, tools=tools)
    with pytest.raises(DataError, match=r"spell the special token.*rows.jsonl:1"):
        encode(TOOLS, DataConfig(), example)
    key = Message("assistant", "a", {"tool_calls": [call({"<|im_end|>": 1})]})
    with pytest.raises(DataError, match="spell the special token"):
        encode(TOOLS, DataConfig(), Example("rows.jsonl:1", messages=(ASKED[0], key)))


@pytest.mark.parametrize("depth", [1, 10, 45])
def test_nested_arguments_are_written_as_they_are_under_any_depth(depth: int) -> None:
    """Arguments are JSON text for a template that wants text, never for one that takes objects."""
    turns = [{"role": "user", "content": "q"}, assistant(tool_calls=[call(nested(depth))])]
    example = Example("rows.jsonl:1", messages=read_turns(turns, "messages"))
    [row] = encode(CALLS, DataConfig(), example).rows
    tokenizer = byte_level_tokenizer(start=False, pad=True, chat_template=CALLS)
    assert f"yesf {json.dumps(nested(depth))}<|im_end|>" in tokenizer.decode(row.input_ids)


def test_arguments_that_python_would_print_are_written_as_json() -> None:
    template = CALLS.replace(" | tojson", "")
    turns = [{"role": "user", "content": "q"}, assistant(tool_calls=[call({"x": 1, "y": None})])]
    example = Example("rows.jsonl:1", messages=read_turns(turns, "messages"))
    [row] = encode(template, DataConfig(), example).rows
    tokenizer = byte_level_tokenizer(start=False, pad=True, chat_template=template)
    assert 'yesf {"x": 1, "y": null}<|im_end|>' in tokenizer.decode(row.input_ids)


def test_a_name_is_text_and_spells_no_special_token() -> None:
    named = read_turns([{"role": "user", "content": "q", "name": 7}], "messages")
    assert named[0].fields == {"name": "7"}
    turns = (Message("user", "q", {"name": "<|im_end|>"}), ASKED[1])
    with pytest.raises(DataError, match=r"names spell the special token '<\|im_end\|>'"):
        encode(TOOLS, DataConfig(), Example("rows.jsonl:1", messages=turns))


def test_keys_that_the_template_does_not_write_are_named() -> None:
    turns = [
        {"role": "user", "content": "q", "name": "Ann"},
        assistant(tool_calls=[call({"x": 1})]),
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
        assistant(),
    ]
    example = Example("rows.jsonl:1", messages=read_turns(turns, "messages"))
    [plain] = encode(CALLS, DataConfig(), example).rows
    assert plain.unused_keys == ("name", "tool_call_id")
    named = CALLS.replace("{{ m.role }}", "{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}")
    [row] = encode(named, DataConfig(), example).rows
    assert row.unused_keys == ("tool_call_id",)
    assert turn_notes([plain, row]) == (
        "keys of turns that the chat template does not use: name (1 row), tool_call_id (2 rows)",
    )


def test_turns_behind_the_last_answer_are_counted() -> None:
    asked_again = Example("rows.jsonl:1", messages=(*ASKED, Message("user", "x"), ASKED[0]))
    rows = encode(TOOLS, DataConfig(), asked_again, Example("rows.jsonl:2", messages=ASKED)).rows
    assert [row.unanswered for row in rows] == [2, 0]
    assert rows[0].input_ids == rows[1].input_ids
    assert turn_notes(rows) == (
        "turns not used: 2 in 1 of 2 rows stand behind the assistant's last turn, where nothing "
        "is learnt (rows.jsonl:1)",
    )


def test_a_template_that_turns_the_order_round_is_refused() -> None:
    with pytest.raises(DataError, match="before an earlier one"):
        encode(REVERSED, DataConfig(), Example("rows.jsonl:1", messages=ASKED * 2))


def test_rows_whose_every_turn_is_masked_are_not_blamed_on_their_length() -> None:
    masked = (ASKED[0], Message("assistant", "a", supervised=False))
    with pytest.raises(DataError, match="every turn that would be is masked"):
        encode(TOOLS, DataConfig(), Example("rows.jsonl:1", messages=masked))


def test_marks_avoid_what_turns_and_tools_say() -> None:
    private = "".join(map(chr, range(0xE000, 0xF900)))
    turns = [{"role": "user", "content": private}]
    skeleton = make_skeleton(turns, TemplateWords(), marked=lambda _: True)
    assert skeleton.left not in private
    skeleton = make_skeleton(
        turns[:0], TemplateWords(), marked=lambda _: True, context=["\ue000\ue001"]
    )
    assert skeleton.left not in "\ue000\ue001"
    every = private + "".join(map(chr, range(0xF0000, 0xF0100)))
    with pytest.raises(DataError, match="every private-use character"):
        make_skeleton([{"role": "user", "content": every}], TemplateWords(), marked=lambda _: True)
