"""Every chat template that TRL ships: the mask is the template's own, or provably the words."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from loratune.data.chat import ChatRenderer
from loratune.data.conversations import read_turns
from loratune.data.marks import has_marks
from loratune.data.segments import RowText
from loratune.errors import DataError

from .chat_templates import CHATML, GRANITE, LLAMA2, MISTRAL, PHI4, SMOLLM2, trl_templates

OWN = {
    "llama2": LLAMA2, "mistral": MISTRAL, "phi4": PHI4, "smollm2": SMOLLM2, "granite": GRANITE,
    "chatml": CHATML,
}  # fmt: skip
TEMPLATES = {**OWN, **trl_templates()}
MARKED = [name for name in TEMPLATES if has_marks(TEMPLATES[name])]
LISTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
"""Templates of vision models: they write the parts of a list, and no content that is a string."""
NO_SYSTEM = {"gemma", "mistral"}
SPECIAL = re.compile(
    r"<\|[^|>\s]+\|>|<｜[^｜>]+｜>|<(?:start|end)_of_\w+>|<\|[a-z_\"]+>|<[a-z_\"]+\|>|</s>|\[e~\["
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
Turns = Sequence[dict[str, Any]]


def renders(template: str, turns: Turns, **options: Any) -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(
        conversations=[list(turns)], chat_template=template, **TOKENS, **options
    )


class TextOnly:
    """As much of a tokenizer as writes conversations."""

    special_tokens_map = TOKENS

    def __init__(self, template: str) -> None:
        self.chat_template = template
        self.all_special_tokens = sorted({*SPECIAL.findall(template), *TOKENS.values()})

    def apply_chat_template(self, conversation: Turns, **options: Any) -> str:
        options.pop("tokenize")
        return renders(options.pop("chat_template"), conversation, **options)[0][0]


def row_of(template: str, turns: Turns) -> RowText:
    renderer = ChatRenderer(TextOnly(template), template)  # type: ignore[arg-type]
    return renderer.row(read_turns(list(turns), "messages"), "talk.jsonl:1")


def supervised(row: RowText) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    place = 0
    for segment in row.segments:
        end = place + len(segment.text)
        if segment.supervised and spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], end)
        elif segment.supervised:
            spans.append((place, end))
        place = end
    return spans


def text_of(row: RowText) -> str:
    return "".join(segment.text for segment in row.segments)


def talk(*texts: str, system: str = "") -> list[dict[str, Any]]:
    """Texts in turn by the user and the assistant."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


TALKS = {
    "one turn": talk("Hi there", "Hello"),
    "an answer that was asked": talk("Say Four.", "Four.", "Is Four. right? Yes", "Yes"),
    "system": talk("A or B? say A", "A", system="Say A"),
    "spaces": talk("x", "  How can I help?  ", " y ", "\nok\n"),
    "thoughts": talk("x", "<think>\nhmm\n</think>\n\nYes", "y", "<think>\nhm2\n</think>\n\nNo"),
    "a call": [
        {"role": "user", "content": "weather in Bern?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
            "name": "get_weather", "arguments": {"city": 'Bern "x" ü'}}}]},
        {"role": "tool", "name": "get_weather", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
}  # fmt: skip


def family(name: str) -> str:
    return name.removesuffix("_training")


def as_parts(name: str, turns: Turns) -> Turns:
    """The turns as a user of the template has to write them."""
    if family(name) not in LISTS_ONLY:
        return turns
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("about", TALKS)
def test_marked_parts_are_those_of_transformers(name: str, about: str) -> None:
    template, turns = TEMPLATES[name], TALKS[about]
    try:
        row = row_of(template, turns)
    except DataError as error:
        assert "raised" in str(error) or "call" in str(error)
        return
    rendered = renders(template, as_parts(name, turns), return_assistant_tokens_mask=True)
    text = rendered[0][0]
    theirs: list[list[int]] = []
    for start, end in rendered[1][0]:
        if theirs and theirs[-1][1] == start:
            theirs[-1][1] = end
        elif start < end:
            theirs.append([start, end])
    ours = supervised(row)
    assert text.startswith(text_of(row))
    assert [start for start, _ in ours] == [start for start, _ in theirs]
    for (_, end), (_, their_end) in zip(ours, theirs, strict=True):
        between = text[min(end, their_end) : max(end, their_end)]
        assert not SPECIAL.sub("", between).strip(), "only the end token lies between the ends"


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_part_says_its_turn_and_nobody_elses_words(name: str) -> None:
    template = TEMPLATES[name]
    words = ["quill", "brass", "fjord", "waltz", "nymph", "vexed"]
    turns = talk(*words)
    row = row_of(template, turns)
    text = text_of(row)
    parts = [text[start:end] for start, end in supervised(row)]
    assert len(parts) == 3
    for part, word in zip(parts, words[1::2], strict=True):
        assert word in part
        assert not any(other in part for other in words if other != word)
        ending = part[part.index(word) + len(word) :]
        assert not SPECIAL.sub("", ending).strip()
    assert text.count("quill") == text.count("vexed") == 1


PIECES = [
    "a", "A", "user", "assistant", "the end", "</s>", "<|im_end|>", "<|im_start|>user\n", "[INST]",
    "ü", "日本", "🦊", "{{ x }}", "{% if %}", '"', "\\n", "\n", "  ", "<b>", "'", "\u200b",
    "e\u0301",
]  # fmt: skip


def drawn_talk(random_: random.Random) -> list[str]:
    """Texts that repeat each other, spell tokens and hold any character."""
    count = 2 * random_.randint(1, 3)
    texts: list[str] = []
    for _ in range(count):
        text = "".join(random_.choices(PIECES, k=random_.randint(1, 5)))
        earlier = random_.choice(texts) if texts and random_.random() < 0.4 else ""
        texts.append(f"{earlier}{text}" if text.strip() or earlier else f"{text}b")
    return texts


def named_texts(texts: Sequence[str]) -> list[str]:
    """The same conversation, every text a word of its own within the same white space."""
    named = []
    for number, text in enumerate(texts):
        word = f"qz{number}zq"
        named.append(text.replace(text.strip(), word, 1))
    return named


def with_brackets(row: RowText) -> str:
    text, result, done = text_of(row), "", 0
    for start, end in supervised(row):
        result += f"{text[done:start]}\x01{text[start:end]}\x02"
        done = end
    return result + text[done:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_moves_the_mask(name: str) -> None:
    """Whatever is said, the mask is that of the conversation in which every text is unique."""
    template = TEMPLATES[name]
    random_ = random.Random(name)
    renderer = ChatRenderer(TextOnly(template), template)  # type: ignore[arg-type]
    for _ in range(12):
        texts = drawn_talk(random_)
        system = random_.choice(["", "", *PIECES[:4]]) if family(name) not in NO_SYSTEM else ""
        named = named_texts(texts)
        row = renderer.row(read_turns(talk(*texts, system=system), "messages"), "t:1")
        plain = renderer.row(read_turns(talk(*named, system=system), "messages"), "t:1")
        expected = with_brackets(plain)
        for number, text in enumerate(texts):
            expected = expected.replace(f"qz{number}zq", text.strip())
        assert with_brackets(row) == expected
