"""What is supervised under the field's chat templates, against masks written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, Learn, Overlong, Reasoning, RowFormat
from loratune.data.conversations import read_turns
from loratune.data.encode import Encoder
from loratune.data.encoded_rows import EncodedRow
from loratune.data.rows import Example
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import DataError

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


def encoded(template: str, turns: list[Any], **settings: Any) -> tuple[Any, EncodedRow]:
    tokenizer = tokenizer_for(template)
    chosen = PromptFormat(RowFormat.messages, chat_template=template)
    encoder = Encoder(RowTokenizer(tokenizer), chosen, DataConfig(**settings))
    tools = settings.pop("tools", None)
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
