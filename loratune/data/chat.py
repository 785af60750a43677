"""Conversations: the chat template's text, and which part of it the model is to write.

What the assistant writes is found by rendering the conversation up to each of its turns; a
template that marks it with ``{% generation %}`` is believed.  Either way the assistant's words
must lie in the part found, or the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.rendering import FIX, bounded, check_template
from loratune.data.rows import Message
from loratune.data.tokenizing import Tokenizer
from loratune.errors import DataError, SecurityError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "sentinel-of-the-answer"

Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row's text.

    Attributes:
        text: the characters.
        supervised: whether they are the model's to write.
    """

    text: str
    supervised: bool


def chat_template_of(tokenizer: Tokenizer) -> str:
    """The tokenizer's own chat template.

    Raises:
        DataError: if it has none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        fix = "use a chat model, add chat_template to tokenizer_config.json, or use prompt rows"
        raise DataError("the tokenizer has no chat template", where="tokenizer", fix=fix)
    return template


class ChatRenderer:
    """Conversations as text, under one chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        check_template(template)
        self.tokenizer = tokenizer
        self.template = template
        self._stops = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)

    def segments(self, messages: Sequence[Message], source: str) -> tuple[list[Segment], bool]:
        """The conversation cut where the assistant begins and ends.

        Returns:
            The segments in order; together they are the rendered text up to the last turn's end.
            Then whether that end is a special token of the template.

        Raises:
            DataError: if the template raises, or changes the assistant's words.
        """
        full = self._render(messages, False, source)
        if _MARKED.search(self.template):
            spans = self._marked_spans(messages, full, source)
        else:
            spans = self._rendered_spans(messages, full, source)
        segments, done = [], 0
        for start, end in spans:
            segments += [Segment(full[done:start], False), Segment(full[start:end], True)]
            done = end
        ended = any(full[: spans[-1][1]].endswith(stop) for stop in self._stops)
        return [segment for segment in segments if segment.text], ended

    def prompt(self, messages: Sequence[Message], source: str) -> list[str]:
        """The text before the assistant's next turn, in the stretches in which training saw it."""
        answered = [*messages, Message("assistant", _SENTINEL)]
        segments, _ = self.segments(answered, source)
        return [segment.text for segment in segments[:-1]]

    def _render(self, messages: Sequence[Message], generation: bool, source: str) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        options = {"tokenize": False, "add_generation_prompt": generation}
        try:
            with bounded():
                text = self.tokenizer.apply_chat_template(
                    turns, chat_template=self.template, **options
                )
        except SecurityError as error:
            error.where = source
            raise
        except Exception as error:  # a template is a program of its own and may raise anything
            if type(error).__name__ == "SecurityError":  # the sandbox's own
                cause = f"the chat template reaches for the program: {error}"
                raise SecurityError(cause, where=source, fix=FIX) from error
            reason = str(error).partition("\n")[0][:200]
            cause = f"the chat template raised {type(error).__name__}: {reason}"
            raise DataError(cause, where=source, fix="fix the row's turns") from error
        return str(text)

    def _rendered_spans(
        self, messages: Sequence[Message], full: str, source: str
    ) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(messages):
            if turn.role != "assistant":
                continue
            start = self._start(messages[:number], full, source)
            after = full
            if number + 1 < len(messages):
                after = self._render(messages[: number + 1], False, source)
            end = _shared_length(full, after)
            floor = max(start or 0, spans[-1][1] if spans else 0)
            place = full.find(turn.content.strip(), floor, end)
            if place < 0:
                raise _changed(number, source)
            written = place + len(turn.content.strip())
            begin = start if start is not None else _before_spaces(full, place, turn.content)
            spans.append((begin, self._stop(full, written, end, turn.content)))
        return spans

    def _start(self, before: Sequence[Message], full: str, source: str) -> int | None:
        """Length of the prompt with the assistant's header, or None if the template writes none."""
        if not before:
            return None
        prompt = self._render(before, True, source)
        if not full.startswith(prompt) or prompt == self._render(before, False, source):
            return None
        return len(prompt)

    def _stop(self, full: str, written: int, end: int, content: str) -> int:
        """Where the turn ends: after its first special token, else after its last word."""
        tail = full[written:end]
        places = [(place, stop) for stop in self._stops if (place := tail.find(stop)) >= 0]
        if places:
            place, stop = min(places, key=lambda found: found[0])
            return written + place + len(stop)
        margin = content[len(content.rstrip()) :]
        return written + len(margin) if margin and tail.startswith(margin) else written

    def _marked_spans(
        self, messages: Sequence[Message], full: str, source: str
    ) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        special = getattr(self.tokenizer, "special_tokens_map", {})
        with bounded():
            rendered: Any = render_jinja_template(
                conversations=[turns],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **special,
            )
        text, found = rendered[0][0], rendered[1][0]
        spans = [(int(start), int(end)) for start, end in found]
        answers = [(n, turn.content) for n, turn in enumerate(messages) if turn.role == "assistant"]
        if text != full or len(spans) != len(answers):
            raise DataError("the chat template's {% generation %} marks do not fit", where=source)
        for (number, content), (start, end) in zip(answers, spans, strict=True):
            if content.strip() not in full[start:end]:
                raise _changed(number, source)
        return [(start, self._marked_end(full, start, end)) for start, end in spans]

    def _marked_end(self, full: str, start: int, end: int) -> int:
        """The end of a marked part, moved to just behind the special token that closes the turn."""
        words = full[start:end].rstrip()
        if any(words.endswith(stop) for stop in self._stops):
            return start + len(words)
        closing = next((stop for stop in self._stops if full.startswith(stop, end)), "")
        return end + len(closing)


def _shared_length(one: str, other: str) -> int:
    """Characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    differing = (place for place, pair in pairs if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))


def _before_spaces(full: str, place: int, content: str) -> int:
    """``place``, moved back over the content's own margin and the spaces before it.

    Where a header is followed by a space, the model writes the space: tokens begin with it.
    """
    margin = content[: len(content) - len(content.lstrip())]
    if margin and full[:place].endswith(margin):
        place -= len(margin)
    return len(full[:place].rstrip(" "))


def _changed(number: int, source: str) -> DataError:
    cause = f"the chat template changes the words of turn {number + 1} (assistant)"
    fix = "mark them in the template with {% generation %}, or fix the row"
    return DataError(cause, where=source, fix=fix)
