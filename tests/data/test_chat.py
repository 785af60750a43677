from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, Overlong, RowFormat
from loratune.data.chat import chat_template_of
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow
from loratune.data.rows import Example, Message
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import DataError
from loratune.loss.constants import IGNORED

from .conftest import byte_level_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_LIKE = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
WITHOUT_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SHOUTING = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
RAISING = "{{ raise_exception('roles must alternate') }}"

TALK = (
    Message("user", "hello world"),
    Message("assistant", "one two"),
    Message("user", "one two"),
    Message("assistant", "the red fox"),
)


def encode(
    template: str, talk: tuple[Message, ...] = TALK, *, start: bool = True
) -> tuple[Any, Any, EncodedRow]:
    tokenizer = byte_level_tokenizer(start=start, pad=True, chat_template=template)
    chosen = PromptFormat(RowFormat.messages, chat_template=chat_template_of(tokenizer))
    encoder = Encoder(RowTokenizer(tokenizer), chosen, DataConfig())
    example = [Example("talk.jsonl:1", messages=talk)]
    rows = encoder.encode(example, max_length=512, overlong=Overlong.truncate).rows
    return tokenizer, encoder, rows[0]


def supervised_turns(tokenizer: Any, row: EncodedRow) -> list[str]:
    return [tokenizer.decode(row.input_ids[start:end]) for start, end in row.spans]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_assistant_turn_is_supervised_with_its_end_and_nothing_else(template: str) -> None:
    tokenizer, _, row = encode(template)
    assert supervised_turns(tokenizer, row) == ["one two<|im_end|>", "the red fox<|im_end|>"]
    others = [t for t, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED]
    assert "red fox" not in tokenizer.decode(others)


@pytest.mark.parametrize(
    "beside",
    ["{# {% generation %} #}", "{% raw %}{% generation %}{% endraw %}", "{{ '{% generation %}' }}"],
)
def test_marks_in_a_comment_or_a_text_mark_nothing(beside: str) -> None:
    tokenizer, _, row = encode(beside + CHATML)
    assert supervised_turns(tokenizer, row) == ["one two<|im_end|>", "the red fox<|im_end|>"]


def test_a_template_whose_header_only_the_turn_itself_writes() -> None:
    tokenizer, _, row = encode(LLAMA_LIKE)
    assert [text.strip() for text in supervised_turns(tokenizer, row)] == [
        "one two</s>",
        "the red fox</s>",
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE, WITHOUT_END])
@pytest.mark.parametrize("start", [True, False])
def test_one_start_token_whether_or_not_the_template_writes_it(template: str, start: bool) -> None:
    tokenizer, _, row = encode(template, start=start)
    expected = 1 if start or template.startswith("<s>") else 0
    assert row.input_ids.count(tokenizer.convert_tokens_to_ids("<s>")) == expected


def test_a_template_without_end_tokens_gets_one_at_the_end() -> None:
    tokenizer, _, row = encode(WITHOUT_END)
    assert supervised_turns(tokenizer, row) == [" one two", " the red fox</s>"]


@pytest.mark.parametrize("template", [CHATML, MARKED, LLAMA_LIKE, WITHOUT_END])
def test_generation_is_given_the_prefix_that_training_saw(template: str) -> None:
    _, encoder, row = encode(template)
    question = Example("talk.jsonl:1", messages=TALK[:-1])
    assert encoder.prompt_ids(question) == row.input_ids[: row.prompt_length]


def test_a_conversation_that_the_assistant_opens_is_supervised() -> None:
    tokenizer, _, row = encode(CHATML, (Message("assistant", "hello"),))
    assert supervised_turns(tokenizer, row) == ["hello<|im_end|>"]


def test_a_template_that_changes_the_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"changes the words of turn 2.*talk.jsonl:1"):
        encode(SHOUTING)


def test_a_template_that_raises_is_named_with_line_and_reason() -> None:
    with pytest.raises(DataError, match=r"roles must alternate.*talk.jsonl:1"):
        encode(RAISING)


def test_a_tokenizer_without_a_chat_template_is_told_how_to_mend_it(opt_like: Any) -> None:
    with pytest.raises(DataError, match=r"no chat template.*tokenizer_config.json"):
        chat_template_of(opt_like)
