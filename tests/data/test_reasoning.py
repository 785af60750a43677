"""Reasoning in the content: both its ends must be known where it is told from the answer."""

from __future__ import annotations

import pytest

from loratune.config.schema import Reasoning
from loratune.data.chat import ChatRenderer
from loratune.data.conversations import read_turns
from loratune.errors import DataError

from .chat_templates import CHATML, tokenizer_for

OPENING = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
"""The header opens the reasoning, so that the model writes the closing tag only."""
FROM_CLOSE = "It said A.\n</think>\n\nA"


def learnt(template: str, answer: str, mode: Reasoning) -> str:
    turns = [{"role": "user", "content": "Say A."}, {"role": "assistant", "content": answer}]
    renderer = ChatRenderer(tokenizer_for(template), template, reasoning=mode)
    row = renderer.row(read_turns(turns, "messages"), "talk.jsonl:1")
    return "".join(segment.text for segment in row.segments if segment.supervised)


@pytest.mark.parametrize("answer", [FROM_CLOSE, "It said A.</think>A", f"<think>\n{FROM_CLOSE}"])
def test_what_the_header_opens_ends_at_the_closing_tag(answer: str) -> None:
    assert learnt(OPENING, answer, Reasoning.drop) == "A<|im_end|>"
    assert learnt(OPENING, answer, Reasoning.context) == "A<|im_end|>"
    written = answer.removeprefix("<think>\n")  # the header's own tag is not the model's to write
    assert learnt(OPENING, answer, Reasoning.learn) == f"{written}<|im_end|>"


@pytest.mark.parametrize("mode", [Reasoning.drop, Reasoning.context])
@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (FROM_CLOSE, r"closes its reasoning with '</think>', and neither it nor the template"),
        ("<think>It said A.", r"opens its reasoning with '<think>', and does not close it"),
        ("[THINK]It</think>A", r"opens its reasoning with '\[THINK\]', and does not close it"),
    ],
)
def test_reasoning_with_one_end_is_told_from_nothing(
    answer: str, fault: str, mode: Reasoning
) -> None:
    with pytest.raises(DataError, match=rf"{fault}.*talk.jsonl:1, turn 2; data.reasoning={mode}"):
        learnt(CHATML, answer, mode)
    assert learnt(CHATML, answer, Reasoning.learn) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("mode", Reasoning)
def test_talk_about_a_tag_is_not_reasoning(mode: Reasoning) -> None:
    answer = "Reasoning ends with </think> there."
    assert learnt(CHATML, answer, mode) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("answer", ["<think>It said A.</think>", "<think>It\n</think>\n\n"])
def test_a_turn_of_reasoning_alone_is_refused_once_that_is_dropped(answer: str) -> None:
    with pytest.raises(DataError, match=r"says nothing beside its reasoning; .*turn 2"):
        learnt(CHATML, answer, Reasoning.drop)
