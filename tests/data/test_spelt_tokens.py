"""Tokens that words spell and the chat template looks for: text in words, tokens in their place."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, Overlong, RowFormat, SpecialTokens
from loratune.data.conversations import read_turns
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow
from loratune.data.rows import Example
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import DataError

from .chat_templates import CHATML, tokenizer_for

CHANNEL = "<channel|>"
STRIPS = (  # as Gemma 4's: what stands before the token is the assistant's own affair
    "{% for m in messages %}<|turn>{{ m.role }}\n"
    "{{ m.content.split('<channel|>')[-1] if m.role == 'assistant' else m.content }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>assistant\n{% endif %}"
)
THINKS = (  # as Qwen 3's
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = '<think>\\n' + c.split('</think>')[0].split('<think>')[-1].strip()"
    " + '\\n</think>\\n\\n' + c.split('</think>')[-1].strip() %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoded(tokenizer: Any, template: str, question: str, answer: str, mode: str) -> EncodedRow:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chosen = PromptFormat(RowFormat.messages, chat_template=template)
    config = DataConfig(special_tokens_in_text=SpecialTokens(mode))
    encoder = Encoder(RowTokenizer(tokenizer), chosen, config)
    example = Example("talk.jsonl:1", messages=read_turns(turns, "messages"))
    [row] = encoder.encode([example], max_length=10_000, overlong=Overlong.error).rows
    return row


def count(tokenizer: Any, row: EncodedRow, token: str) -> int:
    return row.input_ids.count(tokenizer.get_vocab()[token])


@pytest.mark.parametrize(("mode", "expected"), [("text", 0), ("parse", 1)])
def test_a_question_may_spell_what_the_template_looks_for(mode: str, expected: int) -> None:
    tokenizer = tokenizer_for(STRIPS)
    row = encoded(tokenizer, STRIPS, f"what is a{CHANNEL}b?", "a token", mode)
    assert count(tokenizer, row, CHANNEL) == expected
    assert f"what is a{CHANNEL}b?" in tokenizer.decode(row.input_ids)
    assert row.spelt == (CHANNEL,)


def test_a_template_that_acts_on_the_token_is_refused_unless_it_is_meant() -> None:
    tokenizer = tokenizer_for(STRIPS)
    cause = r"acts on '<channel\|>', which turn 2 spells as text; talk.jsonl:1; .*=parse"
    with pytest.raises(DataError, match=cause):
        encoded(tokenizer, STRIPS, "what?", f"{CHANNEL}yes", "text")
    row = encoded(tokenizer, STRIPS, "what?", f"{CHANNEL}yes", "parse")
    assert tokenizer.decode(row.input_ids).endswith("assistant\nyes<turn|>")


def thinking_tokenizer(*, special: bool) -> Any:
    tokenizer = tokenizer_for(THINKS)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_tags_are_tokens_around_reasoning_and_text_in_a_question(special: bool) -> None:
    tokenizer = thinking_tokenizer(special=special)
    question = "Why does </think> end <think>?"
    row = encoded(tokenizer, THINKS, question, "<think>\nhm\n</think>\n\nSo.", "text")
    assert question in tokenizer.decode(row.input_ids)
    assert count(tokenizer, row, "<think>") == count(tokenizer, row, "</think>") == 1
    assert row.spelt == ("</think>", "<think>")
    spans = [tokenizer.decode(row.input_ids[start:end]) for start, end in row.spans]
    assert spans == ["<think>\nhm\n</think>\n\nSo.<|im_end|>"]


@pytest.mark.parametrize("special", [True, False])
def test_an_answer_that_mentions_a_tag_does_not_write_it(special: bool) -> None:
    tokenizer = thinking_tokenizer(special=special)
    with pytest.raises(DataError, match=r"acts on '</think>', which turn 2 spells"):
        encoded(tokenizer, THINKS, "Which tag?", "It is </think> here", "text")
    row = encoded(tokenizer, CHATML, "Which tag?", "It is </think> here", "text")
    assert count(tokenizer, row, "</think>") == 0


def test_such_tokens_are_refused_where_none_may_be_spelt() -> None:
    tokenizer = tokenizer_for(STRIPS)
    with pytest.raises(DataError, match=r"spells the special token '<channel\|>'"):
        encoded(tokenizer, STRIPS, f"a{CHANNEL}b?", "yes", "error")
