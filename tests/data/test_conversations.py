"""Turns as they come: what cannot be meant is refused by name, nothing is lost without a word."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, Overlong, RowFormat
from loratune.data.conversations import read_tools, read_turns
from loratune.data.encode import Encoder
from loratune.data.rows import Example, Message
from loratune.data.skeleton import make_skeleton
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
DEEP = "[" * 100_000


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
    skeleton = make_skeleton(turns, (), marked=lambda _: True)
    assert skeleton.left not in private
    skeleton = make_skeleton(turns[:0], (), marked=lambda _: True, context=["\ue000\ue001"])
    assert skeleton.left not in "\ue000\ue001"
    every = private + "".join(map(chr, range(0xF0000, 0xF0100)))
    with pytest.raises(DataError, match="every private-use character"):
        make_skeleton([{"role": "user", "content": every}], (), marked=lambda _: True)
