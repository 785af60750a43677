"""The tokens with which a chat template closes the assistant's last turn."""

from __future__ import annotations

from loratune.data.chat import ChatRenderer
from loratune.data.rows import Message
from loratune.data.tokenizing import Tokenizer, special_tokens
from loratune.errors import LoratuneError

_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "a"}}}
_ANSWERS = (
    Message("assistant", "answer"),
    Message("assistant", "", {"tool_calls": [_CALL]}),
)
"""Some templates close a turn that calls a tool with a token of its own."""


def turn_ends(tokenizer: Tokenizer, template: str) -> list[int]:
    """Ids of the special tokens behind an answer and behind a call, where there are any."""
    stops, vocabulary = special_tokens(tokenizer), tokenizer.get_vocab()
    found = []
    for answer in _ANSWERS:
        if "tool_calls" in answer.fields and "tool_calls" not in template:
            continue
        try:
            row = ChatRenderer(tokenizer, template).row(
                [Message("user", "question"), answer], "the chat template"
            )
        except LoratuneError:
            continue  # this template has no such turn
        text = "".join(segment.text for segment in row.segments)
        found += [vocabulary[stop] for stop in stops if text.endswith(stop) and stop in vocabulary]
    return list(dict.fromkeys(found))
