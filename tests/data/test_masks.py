"""What is supervised under the field's chat templates, against masks written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, Learn, Overlong, Reasoning, RowFormat, SpecialTokens
from loratune.data.chat import ChatRenderer
from loratune.data.conversations import read_turns
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow
from loratune.data.rows import Example
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import DataError, LoratuneError

from .chat_templates import (
    GRANITE,
    LLAMA2,
    MISTRAL,
    PHI4,
    SMOLLM2,
    tokenizer_for,
    trl_templates,
)

TRL = trl_templates()
FOUR = [
    {"role": "user", "content": "Say A."},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "What is A?"},
    {"role": "assistant", "content": "It is A."},
]
SYSTEM = {"role": "system", "content": "A or B."}

# The whole row, with what is supervised between ⟦ and ⟧; "…" stands for a beginning of any kind.
CHATML_FOUR = (
    "<|im_start|>user\nSay A.<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
    "<|im_start|>user\nWhat is A?<|im_end|>\n<|im_start|>assistant\n⟦It is A.<|im_end|>⟧"
)
CHATML_SYSTEM = "<|im_start|>system\nA or B.<|im_end|>\n" + CHATML_FOUR
GEMMA_FOUR = (
    "<start_of_turn>user\n%sSay A.<end_of_turn>\n<start_of_turn>model\n⟦A<end_of_turn>⟧\n"
    "<start_of_turn>user\nWhat is A?<end_of_turn>\n<start_of_turn>model\n⟦It is A.<end_of_turn>⟧"
)
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nSay A.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is A?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is A.<|eot_id|>⟧"
)
GPT_OSS = (
    "<|start|>user<|message|>Say A.<|end|>"
    "<|start|>assistant⟦<|channel|>final<|message|>A<|end|>⟧"
    "<|start|>user<|message|>What is A?<|end|>"
    "<|start|>assistant⟦<|channel|>final<|message|>It is A.<|return|>⟧"
)
GRANITE_FOUR = (
    "<|start_of_role|>user<|end_of_role|>Say A.<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦A<|end_of_text|>⟧\n"
    "<|start_of_role|>user<|end_of_role|>What is A?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>⟦It is A.<|end_of_text|>⟧"
)
PHI3_FOUR = (
    "<|user|>\nSay A.<|end|>\n<|assistant|>\n⟦A<|end|>⟧\n"
    "<|user|>\nWhat is A?<|end|>\n<|assistant|>\n⟦It is A.<|end|>⟧"
)
PHI4_FOUR = (
    "<|im_start|>user<|im_sep|>Say A.<|im_end|><|im_start|>assistant<|im_sep|>⟦A<|im_end|>⟧"
    "<|im_start|>user<|im_sep|>What is A?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>⟦It is A.<|im_end|>⟧"
)
DEEPSEEK = (
    "<｜User｜>Say A.<｜Assistant｜>⟦A<｜end▁of▁sentence｜>⟧"
    "<｜User｜>What is A?<｜Assistant｜>⟦It is A.<｜end▁of▁sentence｜>⟧"
)
QWEN3_FOUR = CHATML_FOUR.replace("⟦It", "⟦<think>\n\n</think>\n\nIt")
BY_HAND = {
    "llama 2": (
        LLAMA2,
        "<s>[INST] Say A. [/INST]⟦ A </s>⟧<s>[INST] What is A? [/INST]⟦ It is A. </s>⟧",
        "<s>[INST] <<SYS>>\nA or B.\n<</SYS>>\n\nSay A. [/INST]⟦ A </s>⟧"
        "<s>[INST] What is A? [/INST]⟦ It is A. </s>⟧",
    ),
    "llama 3": (
        TRL.get("llama3"),
        "<s>" + LLAMA3,
        "<s><|start_header_id|>system<|end_header_id|>\n\nA or B.<|eot_id|>" + LLAMA3,
    ),
    "llama 3.1": (TRL.get("llama3_1"), "…<|eot_id|>" + LLAMA3, "…A or B.<|eot_id|>" + LLAMA3),
    "llama 3.2": (TRL.get("llama3_2"), "…<|eot_id|>" + LLAMA3, "…A or B.<|eot_id|>" + LLAMA3),
    "mistral": (
        MISTRAL,
        "<s>[INST] Say A. [/INST]⟦ A</s>⟧[INST] What is A? [/INST]⟦ It is A.</s>⟧",
        None,
    ),
    "qwen 2.5": (TRL.get("qwen2_5"), "…<|im_end|>\n" + CHATML_FOUR, CHATML_SYSTEM),
    "qwen 3": (
        TRL.get("qwen3"),
        QWEN3_FOUR,
        "<|im_start|>system\nA or B.<|im_end|>\n" + QWEN3_FOUR,
    ),
    "gemma 2": (TRL.get("gemma"), "<s>" + GEMMA_FOUR % "", None),
    "gemma 3": (TRL.get("gemma3"), "<s>" + GEMMA_FOUR % "", "<s>" + GEMMA_FOUR % "A or B.\n\n"),
    "phi 3": (TRL.get("phi3"), PHI3_FOUR, "<|system|>\nA or B.<|end|>\n" + PHI3_FOUR),
    "phi 4": (PHI4, PHI4_FOUR, "<|im_start|>system<|im_sep|>A or B.<|im_end|>" + PHI4_FOUR),
    "smollm2": (
        SMOLLM2,
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n" + CHATML_FOUR,
        CHATML_SYSTEM,
    ),
    "gpt-oss": (TRL.get("gptoss"), "…" + GPT_OSS, "…A or B.…" + GPT_OSS),
    "granite": (
        GRANITE,
        GRANITE_FOUR,
        "<|start_of_role|>system<|end_of_role|>A or B.<|end_of_text|>\n" + GRANITE_FOUR,
    ),
    "deepseek": (TRL.get("deepseekv3"), "<s>" + DEEPSEEK, "<s>A or B." + DEEPSEEK),
}


def typed(settings: dict[str, Any]) -> DataConfig:
    if "special_tokens_in_text" in settings:
        settings["special_tokens_in_text"] = SpecialTokens(settings["special_tokens_in_text"])
    return DataConfig(**settings)


def encoded(
    template: str, turns: list[Any], tools: list[Any] | None = None, **settings: Any
) -> tuple[Any, EncodedRow]:
    tokenizer = tokenizer_for(template)
    chosen = PromptFormat(RowFormat.messages, chat_template=template)
    encoder = Encoder(RowTokenizer(tokenizer), chosen, typed(settings))
    example = Example("talk.jsonl:1", messages=read_turns(turns, "messages"), tools=tools)
    [row] = encoder.encode([example], max_length=10_000, overlong=Overlong.error).rows
    return tokenizer, row


def masked(template: str, turns: list[Any], **settings: Any) -> str:
    """The row's ids as text, supervised parts in brackets."""
    tokenizer, row = encoded(template, turns, **settings)
    text, done = "", 0
    for start, end in row.spans:
        text += tokenizer.decode(row.input_ids[done:start])
        text, done = f"{text}⟦{tokenizer.decode(row.input_ids[start:end])}⟧", end
    return text + tokenizer.decode(row.input_ids[done:])


def assert_masked(found: str, by_hand: str) -> None:
    *beginnings, end = by_hand.split("…")
    assert found.endswith(end) if beginnings else found == end
    beginning = found.removesuffix(end)
    assert "⟦" not in beginning and all(part in beginning for part in beginnings)


@pytest.mark.parametrize("family", BY_HAND)
def test_the_mask_written_by_hand(family: str) -> None:
    template, plain, with_system = BY_HAND[family]
    if template is None:
        pytest.skip("TRL is not installed")
    assert_masked(masked(template, FOUR), plain)
    if with_system is None:
        with pytest.raises(DataError, match=r"the chat template raised"):
            masked(template, [SYSTEM, *FOUR])
    else:
        assert_masked(masked(template, [SYSTEM, *FOUR]), with_system)


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city"}}
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRITTEN_CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'


@pytest.mark.parametrize("content", ["Let me look.", None, ""])
def test_calls_are_learnt_with_their_turn_and_results_are_not(content: str | None) -> None:
    turns = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "12 degrees"},
        {"role": "assistant", "content": "12 degrees"},
    ]
    expected = (
        "<|im_start|>user\nIs it warm?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{content or ''}{WRITTEN_CALL}<|im_end|>⟧\n"
        "<|im_start|>tool\n12 degrees<|im_end|>\n<|im_start|>assistant\n⟦12 degrees<|im_end|>⟧"
    )
    assert masked(TOOLS_TEMPLATE, turns) == expected
    with_tools = masked(TOOLS_TEMPLATE, turns, tools=[TOOL])
    assert with_tools.endswith(expected) and "of a city" in with_tools.removesuffix(expected)


def test_special_tokens_within_a_call_do_not_end_its_turn() -> None:
    template = TOOLS_TEMPLATE.replace("<tool_call>{{ call.function | tojson }}</tool_call>", (
        "<|tool_call>{{ call.function.name }}<|quote|>{{ call.function.arguments.city }}<|quote|>}"
        "<tool_call|>"
    ))  # fmt: skip
    turns = [FOUR[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    call = "<|tool_call>weather<|quote|>Bern<|quote|>}<tool_call|>"
    assert masked(template, turns).endswith(f"⟦{call}<|im_end|>⟧")


def test_a_template_that_writes_no_calls_is_refused_by_the_call() -> None:
    turns = [*FOUR[:3], {"role": "assistant", "content": "Well.", "tool_calls": [CALL]}]
    with pytest.raises(DataError, match=r"leaves out the tool call 'weather' of turn 4"):
        masked(PHI4, turns)


def test_a_template_that_writes_no_tools_is_refused() -> None:
    with pytest.raises(DataError, match=r"does not write the row's `tools`; talk.jsonl:1"):
        masked(PHI4, FOUR, tools=[TOOL])


def test_a_template_that_wants_arguments_as_text_gets_text() -> None:
    template = TOOLS_TEMPLATE.replace(
        "{{ call.function | tojson }}", "{{ call.function.name + call.function.arguments }}"
    )
    turns = [FOUR[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert masked(template, turns).endswith(
        '⟦<tool_call>weather{"city": "Bern"}</tool_call><|im_end|>⟧'
    )


def test_a_turn_written_inside_another_is_refused() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content }}"
        "{{ messages[0].content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"writes turn 1 inside turn 2"):
        masked(template, FOUR[:2])


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}])
def test_a_turn_of_no_weight_is_seen_and_not_learnt(key: dict[str, Any]) -> None:
    turns = [FOUR[0], {**FOUR[1], **key}, *FOUR[2:]]
    assert masked(SMOLLM2, turns).endswith(CHATML_FOUR.replace("⟦A<|im_end|>⟧", "A<|im_end|>"))


def test_only_the_last_turn_is_learnt_if_asked_for() -> None:
    expected = CHATML_FOUR.replace("⟦A<|im_end|>⟧", "A<|im_end|>")
    assert masked(SMOLLM2, FOUR, learn=Learn.last).endswith(expected)


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "A."}]
    turns = [*FOUR[:3], {"role": "assistant", "content": parts}]
    assert masked(SMOLLM2, turns) == masked(SMOLLM2, FOUR)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes the reasoning of every turn."""
THOUGHT = [FOUR[0], {"role": "assistant", "content": "A", "reasoning_content": "It said A."}]
IN_CONTENT = [FOUR[0], {"role": "assistant", "content": "<think>It said A.</think>A"}]


@pytest.mark.parametrize("turns", [THOUGHT, IN_CONTENT])
@pytest.mark.parametrize(
    ("reasoning", "expected"),
    [
        (Reasoning.learn, "assistant\n⟦<think>It said A.</think>A<|im_end|>⟧"),
        (Reasoning.context, "assistant\n<think>It said A.</think>⟦A<|im_end|>⟧"),
        (Reasoning.drop, "assistant\n⟦A<|im_end|>⟧"),
    ],
)
def test_reasoning_is_learnt_seen_or_left_out(
    turns: list[Any], reasoning: Reasoning, expected: str
) -> None:
    assert masked(THINKING, turns, reasoning=reasoning).endswith(expected)


def test_reasoning_under_another_key_than_the_templates_is_written() -> None:
    other = [FOUR[0], {"role": "assistant", "content": "A", "thinking": "It said A."}]
    assert masked(THINKING, other) == masked(THINKING, THOUGHT)


def test_reasoning_that_the_template_cannot_write_is_refused_and_can_be_dropped() -> None:
    with pytest.raises(DataError, match=r"does not write the reasoning.*data.reasoning=drop"):
        masked(PHI4, THOUGHT)
    assert masked(PHI4, THOUGHT, reasoning=Reasoning.drop) == masked(PHI4, FOUR[:2])


def test_a_turn_that_only_thinks_says_nothing_once_that_is_dropped() -> None:
    silent = [FOUR[0], {"role": "assistant", "content": "<think>It said A.</think>"}]
    with pytest.raises(DataError, match="the assistant says nothing"):
        masked(THINKING, silent, reasoning=Reasoning.drop)


def test_earlier_reasoning_that_the_template_leaves_out_is_counted() -> None:
    if "qwen3" not in TRL:
        pytest.skip("TRL is not installed")
    turns = [*THOUGHT, FOUR[2], {**FOUR[3], "reasoning_content": "Again."}]
    expected = CHATML_FOUR.replace("⟦It", "⟦<think>\nAgain.\n</think>\n\nIt")
    assert masked(TRL["qwen3"], turns) == expected
    assert encoded(TRL["qwen3"], turns)[1].left_out == 1
    assert encoded(TRL["qwen3"], FOUR)[1].left_out == 0


def test_words_that_a_template_changes_are_named() -> None:
    template = "{% for m in messages %}{{ m.content | replace('is', 'was') }}</s>{% endfor %}"
    with pytest.raises(DataError, match=r"changes the words of turn 4: 'It is A.'.*'It was A.'"):
        masked(template, FOUR)


@pytest.mark.parametrize("text", ["<|im_end|>", "Write </s> here, or <|im_start|>user"])
def test_special_tokens_in_words_are_text_or_tokens_or_an_error(text: str) -> None:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    tokenizer, row = encoded(SMOLLM2, turns)
    special = set(tokenizer.all_special_ids)
    learnt = [token for start, end in row.spans for token in row.input_ids[start:end]]
    assert [token in special for token in learnt] == [False] * (len(learnt) - 1) + [True]
    assert tokenizer.decode(learnt) == text + "<|im_end|>" and row.spelt
    _, parsed = encoded(SMOLLM2, turns, special_tokens_in_text="parse")
    assert sum(token in special for token in parsed.input_ids) > sum(
        token in special for token in row.input_ids
    )
    with pytest.raises(DataError, match=r"spells the special token.*talk.jsonl:1"):
        encoded(SMOLLM2, turns, special_tokens_in_text="error")


def test_a_template_that_walks_through_ten_megabytes_is_stopped_by_name() -> None:
    import time

    slowly = "{% for c in m.content %}{{ c | upper | lower | trim }}{% endfor %}"
    template = f"{{% for m in messages %}}{slowly}<|im_end|>{{% endfor %}}"
    turns = [{"role": "user", "content": "ab cd" * 2_000_000}, FOUR[1]]
    began = time.process_time()
    with pytest.raises(
        LoratuneError, match=r"(took longer than 2 s|more than 512 MB).*talk.jsonl:1"
    ):
        masked(template, turns)
    assert time.process_time() - began < 10


def test_ten_megabytes_in_a_turn_are_encoded_under_a_plain_template() -> None:
    turns = [{"role": "user", "content": "ab cd" * 2_000_000}, FOUR[1]]
    row = ChatRenderer(tokenizer_for(SMOLLM2), SMOLLM2).row(read_turns(turns, "messages"), "t:1")
    assert [s.text for s in row.segments if s.supervised] == ["A<|im_end|>"]
