"""Conversations: the chat template's text, and which part of it the model is to write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from loratune.config.schema import Learn, Reasoning, SpecialTokens
from loratune.data.conversations import NAMES
from loratune.data.conversations import REASONING as REASONING_KEYS
from loratune.data.marks import has_marks, marked_spans
from loratune.data.not_supervised import LEARN, REASONING
from loratune.data.numbers import json_text
from loratune.data.probes import header_opens_reasoning, wants_written_arguments
from loratune.data.reasoning import fit_reasoning, reasoning_key
from loratune.data.rendering import TemplateRenderer
from loratune.data.rows import Message
from loratune.data.segments import Range, RowText, Segment, SpellingFinder, cut
from loratune.data.skeleton import TemplateWords, template_keywords
from loratune.data.spans import Rendering, SpanFinder, TurnSpan
from loratune.data.tokenizing import Tokenizer, added_tokens, special_tokens
from loratune.errors import DataError, LoratuneError

_PLACEHOLDER = "answer"
Turn = Mapping[str, Any]


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
        special_tokens_in_text: SpecialTokens = SpecialTokens.text,
    ) -> None:
        self._template = TemplateRenderer(tokenizer, template, clock)
        self._learn, self._reasoning = learn, reasoning
        self._reasoning_key = reasoning_key(template)
        self._stops = special_tokens(tokenizer)
        keywords = template_keywords(template)
        self._written_keys: dict[tuple[object, ...], bool] = {}
        self._spellings = SpellingFinder(self._stops, added_tokens(tokenizer) & {*keywords})
        self._reasoning_opened = header_opens_reasoning(self._render)
        self._has_marks = has_marks(template)
        self._finder = SpanFinder(
            TemplateWords(keywords, self._spellings, self._reasoning_opened),
            self._stops,
            has_marks=self._has_marks,
            parse_tokens=special_tokens_in_text is SpecialTokens.parse,
        )

    def row(
        self, messages: Sequence[Message], source: str, tools: Sequence[Any] | None = None
    ) -> RowText:
        """The conversation up to the assistant's last turn, cut where supervision changes.

        Raises:
            DataError: if the template raises, or changes or leaves out what a turn says.
        """
        try:
            turns = [self._turn(number, message) for number, message in enumerate(messages, 1)]
            rendering, spans = self._rendered(turns, tools)
        except LoratuneError as error:
            error.where = source if not error.where else f"{source}, {error.where}"
            raise
        supervised = self._supervised(rendering, spans, messages)
        end = spans[-1].end
        last = next(span.start for span in spans if span.turn == spans[-1].turn)
        before = self._segments(rendering, supervised, 0, last)
        answer = self._segments(rendering, supervised, last, end)
        ended = rendering.text.endswith(tuple(self._stops), 0, end)
        left_out = len({word.turn for word in rendering.left_out})
        unused = tuple(key for key in NAMES if not self._writes(key, turns, tools, rendering))
        return RowText(
            (*before, *answer),
            len(before),
            ended,
            left_out,
            unanswered=len(turns) - 1 - spans[-1].turn,
            unused_keys=unused,
            unsupervised=self._unsupervised(rendering, spans, messages),
            dropped_reasoning=self._dropped_reasoning(messages, turns),
        )

    def prompt(
        self, messages: Sequence[Message], source: str, tools: Sequence[Any] | None = None
    ) -> list[Segment]:
        """The text before the assistant's next turn, in the segments in which training saw it."""
        row = self.row([*messages, Message("assistant", _PLACEHOLDER)], source, tools)
        return list(row.segments[: row.prompt_segments])

    def _turn(self, number: int, message: Message) -> dict[str, Any]:
        turn = {"role": message.role, "content": message.content, **message.fields}
        try:
            turn = fit_reasoning(
                turn, self._reasoning_key, self._reasoning, opened=self._reasoning_opened
            )
        except DataError as error:
            error.where = f"turn {number}"
            raise
        if "tool_calls" in turn and self._arguments_written:
            turn["tool_calls"] = [_with_written_arguments(call) for call in turn["tool_calls"]]
        return turn

    @cached_property
    def _arguments_written(self) -> bool:
        """Whether the template takes the arguments of calls as JSON text."""
        return wants_written_arguments(self._render)

    def _render(
        self, turns: Sequence[Turn], generation: bool, tools: Sequence[Any] | None = None
    ) -> str:
        return self._template.text(turns, generation=generation, tools=tools)

    # -- rendering -----------------------------------------------------------------------------

    def _rendered(
        self, turns: Sequence[Turn], tools: Sequence[Any] | None
    ) -> tuple[Rendering, Sequence[TurnSpan]]:
        rendering = self._finder.locate(turns, partial(self._render, tools=tools), context=tools)
        if tools and self._render(turns, False) == rendering.text:
            fix = "use a template that writes them, or remove the column `tools`"
            raise DataError("the chat template does not write the row's `tools`", fix=fix)
        spans: Sequence[TurnSpan] = rendering.spans
        if self._has_marks:
            text, marks = self._template.marked(turns, tools)
            spans = marked_spans(text, marks, rendering, turns, self._stops)
        if not spans:
            fix = "give the assistant's turns text, or remove the row"
            raise DataError("the assistant says nothing", fix=fix)
        return rendering, spans

    def _writes(
        self, key: str, turns: Sequence[Turn], tools: Sequence[Any] | None, rendering: Rendering
    ) -> bool:
        """Whether the template writes a key of the turns that have it, or depends on it."""
        shape = (key, *((turn["role"], *turn) for turn in turns))
        if not any(key in turn for turn in turns):
            return True
        if shape not in self._written_keys:
            bare = [{name: item for name, item in turn.items() if name != key} for turn in turns]
            try:
                written = self._render(bare, False, tools) != rendering.text
            except DataError:
                written = True
            self._written_keys[shape] = written
        return self._written_keys[shape]

    # -- which part is supervised --------------------------------------------------------------

    def _supervised(
        self, rendering: Rendering, spans: Sequence[TurnSpan], messages: Sequence[Message]
    ) -> list[Range]:
        """Character ranges with loss: the recipe's choice, and each turn's own."""
        chosen = [span for span in spans if messages[span.turn].supervised]
        if self._learn is Learn.last:
            chosen = [span for span in chosen if span.turn == spans[-1].turn]
        if self._reasoning is Reasoning.context:
            chosen = [replace(span, start=_behind_reasoning(rendering, span)) for span in chosen]
        return [(span.start, span.end) for span in chosen]

    def _unsupervised(
        self, rendering: Rendering, spans: Sequence[TurnSpan], messages: Sequence[Message]
    ) -> tuple[str, ...]:
        """Why, for each of the assistant's turns without loss."""
        reasons = []
        for turn in dict.fromkeys(span.turn for span in spans):
            own = [span for span in spans if span.turn == turn]
            if not messages[turn].supervised:
                reasons.append(messages[turn].masked_by)
            elif self._learn is Learn.last and turn != spans[-1].turn:
                reasons.append(LEARN)
            elif self._reasoning is Reasoning.context and all(
                _behind_reasoning(rendering, span) >= span.end for span in own
            ):
                reasons.append(REASONING)
        return tuple(reasons)

    def _dropped_reasoning(self, messages: Sequence[Message], turns: Sequence[Turn]) -> int:
        """Turns whose reasoning ``data.reasoning=drop`` has removed."""
        if self._reasoning is not Reasoning.drop:
            return 0
        return sum(
            message.content != turn["content"]
            or any(key in message.fields for key in REASONING_KEYS)
            for message, turn in zip(messages, turns, strict=True)
        )

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


def _with_written_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_written_arguments(call["function"])}
    return {**call, "arguments": json_text(call["arguments"])}


def _behind_reasoning(rendering: Rendering, span: TurnSpan) -> int:
    """Where a turn's words begin that are not reasoning."""
    own = [
        placed
        for placed in rendering.words
        if placed.word.turn == span.turn and span.start <= placed.start < span.end
    ]
    if not any(placed.word.is_reasoning for placed in own):
        return span.start
    said = [placed.start for placed in own if not placed.word.is_reasoning]
    return min(said, default=span.end)
