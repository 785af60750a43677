"""Conversations: the chat template's text, and which part of it the model is to write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratune.config.schema import Learn, Reasoning
from loratune.data.clock import with_clock
from loratune.data.conversations import REASONING
from loratune.data.rendering import FIX, bounded, check_template
from loratune.data.rows import Message
from loratune.data.segments import Range, RowText, Segment, SpellingFinder, cut
from loratune.data.spans import Rendering, SpanFinder, TurnSpan, is_reasoning
from loratune.data.tokenizing import Tokenizer, special_tokens
from loratune.errors import DataError, SecurityError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "answer"


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

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        learn: Learn = Learn.all,
        reasoning: Reasoning = Reasoning.learn,
        clock: str | None = None,
    ) -> None:
        check_template(template)
        self.tokenizer = tokenizer
        self.template = with_clock(template, clock)
        self._learn, self._reasoning = learn, reasoning
        self._stops = special_tokens(tokenizer)
        self._spellings = SpellingFinder(self._stops)
        self._finder = SpanFinder(template, self._stops)
        self._has_marks = bool(_MARKED.search(template))

    def row(
        self, messages: Sequence[Message], source: str, tools: Sequence[Any] | None = None
    ) -> RowText:
        """The conversation up to the assistant's last turn, cut where supervision changes.

        Raises:
            DataError: if the template raises, or changes or leaves out what a turn says.
        """
        rendering, spans = self._rendered([self._turn(m) for m in messages], source, tools)
        text = rendering.text[: spans[-1].end]
        supervised = self._supervised(rendering, spans, messages)
        last = next(span.start for span in spans if span.turn == spans[-1].turn)
        before = self._segments(rendering, supervised, 0, last)
        answer = self._segments(rendering, supervised, last, spans[-1].end)
        ended = any(text.endswith(stop) for stop in self._stops)
        return RowText((*before, *answer), len(before), ended)

    def prompt(
        self, messages: Sequence[Message], source: str, tools: Sequence[Any] | None = None
    ) -> list[Segment]:
        """The text before the assistant's next turn, in the segments in which training saw it."""
        row = self.row([*messages, Message("assistant", _PLACEHOLDER)], source, tools)
        return list(row.segments[: row.prompt_segments])

    def _turn(self, message: Message) -> dict[str, Any]:
        turn = {"role": message.role, "content": message.content, **message.fields}
        if self._reasoning is Reasoning.drop:
            turn = {key: value for key, value in turn.items() if key not in REASONING}
        return turn

    def _rendered(
        self, turns: Sequence[Mapping[str, Any]], source: str, tools: Sequence[Any] | None
    ) -> tuple[Rendering, Sequence[TurnSpan]]:
        def render(some: Sequence[Mapping[str, Any]], generation: bool) -> str:
            return self._render(some, generation, source, tools)

        try:
            rendering = self._finder.locate(turns, render, context=tools)
            spans: Sequence[TurnSpan] = rendering.spans
            if self._has_marks:
                spans = self._marked_spans(turns, rendering, source, tools)
        except DataError as error:
            error.where = error.where or source
            raise
        return rendering, spans

    def _render(
        self,
        turns: Sequence[Mapping[str, Any]],
        generation: bool,
        source: str,
        tools: Sequence[Any] | None,
    ) -> str:
        options = {"tokenize": False, "add_generation_prompt": generation}
        try:
            with bounded():
                text = self.tokenizer.apply_chat_template(
                    [dict(turn) for turn in turns],
                    chat_template=self.template,
                    tools=tools,
                    **options,
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

    # -- which part is supervised --------------------------------------------------------------

    def _supervised(
        self, rendering: Rendering, spans: Sequence[TurnSpan], messages: Sequence[Message]
    ) -> list[Range]:
        """Character ranges with loss: the recipe's choice, and each turn's own."""
        last = max((span.turn for span in spans), default=-1)
        chosen = []
        for span in spans:
            if not messages[span.turn].supervised:
                continue
            if self._learn is Learn.last and span.turn != last:
                continue
            start = span.start
            if self._reasoning is Reasoning.context:
                start = _behind_reasoning(rendering, span)
            chosen.append((start, span.end))
        return chosen

    def _segments(
        self, rendering: Rendering, supervised: Sequence[Range], start: int, end: int
    ) -> list[Segment]:
        """The text from ``start`` to ``end``, cut also at special tokens that a turn spells."""

        def within(ranges: Iterable[Range]) -> list[Range]:
            cuts = [(max(a, start) - start, min(b, end) - start) for a, b in ranges]
            return [(a, b) for a, b in cuts if a < b]

        spelt = [
            place
            for word in rendering.words
            for place in self._spellings.ranges(rendering.text[word.start : word.end], word.start)
        ]
        return cut(rendering.text[start:end], within(supervised), within(spelt))

    # -- templates with {% generation %} -------------------------------------------------------

    def _marked_spans(
        self,
        turns: Sequence[Mapping[str, Any]],
        rendering: Rendering,
        source: str,
        tools: Sequence[Any] | None,
    ) -> list[TurnSpan]:
        """The template's own marks; parts that touch are one, each ends behind its end token."""
        from transformers.utils.chat_template_utils import render_jinja_template

        special = getattr(self.tokenizer, "special_tokens_map", {})
        with bounded():
            rendered: Any = render_jinja_template(
                conversations=[[dict(turn) for turn in turns]],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **special,
            )
        text, marks = rendered[0][0], rendered[1][0]
        if text != rendering.text:
            cause = "the chat template renders something else with its {% generation %} marks"
            raise DataError(cause, where=source, fix=FIX)
        spans: list[TurnSpan] = []
        for start, end in _merged((int(a), int(b)) for a, b in marks):
            owners = {w.word.turn for w in rendering.words if w.start < end and w.end > start}
            foreign = [n for n in owners if turns[n]["role"] != "assistant"]
            if foreign:
                cause = f"the {{% generation %}} marks cover words of turn {foreign[0] + 1}"
                raise DataError(cause, where=source, fix=FIX)
            turn = max(owners, default=spans[-1].turn if spans else 0)
            spans.append(TurnSpan(turn, start, self._marked_end(text, start, end)))
        if not spans:
            raise DataError("the {% generation %} marks cover nothing", where=source, fix=FIX)
        return spans

    def _marked_end(self, full: str, start: int, end: int) -> int:
        """The end of a marked part, moved to just behind the special token that closes the turn."""
        words = full[start:end].rstrip()
        if any(words.endswith(stop) for stop in self._stops):
            return start + len(words)
        closing = next((stop for stop in self._stops if full.startswith(stop, end)), "")
        return end + len(closing)


def _merged(marks: Any) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in marks:
        if start == end:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _behind_reasoning(rendering: Rendering, span: TurnSpan) -> int:
    """Where a turn's words begin that are no reasoning."""
    own = [w for w in rendering.words if w.word.turn == span.turn and w.start >= span.start]
    if not any(is_reasoning(word.word) for word in own):
        return span.start
    said = [word.start for word in own if not is_reasoning(word.word)]
    return min(said, default=span.end)
