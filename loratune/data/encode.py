"""Examples to ids, with what is supervised marked by position, never by token id.

A row longer than ``max_length`` loses its end: what is left of it begins exactly as generation
begins, with the whole prompt.  A row whose prompt alone fills ``max_length`` has nothing left to
learn and is dropped as ``no_target``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loratune.config.schema import DataConfig, Overlong, SpecialTokens
from loratune.data.chat import ChatRenderer
from loratune.data.conversations import NAMES
from loratune.data.encoded_rows import (
    EncodedRow,
    EncodedRows,
    learnable,
    truncate,
)
from loratune.data.not_supervised import IN_HISTORY
from loratune.data.rows import ERRORS_SHOWN, Example, raise_first
from loratune.data.segments import RowText, Segment, SpellingFinder, cut
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer, special_tokens
from loratune.errors import DataError


class Encoder:
    """Examples of one format to ids."""

    def __init__(
        self, tokenizer: RowTokenizer, prompt_format: PromptFormat, data: DataConfig
    ) -> None:
        self.tokenizer = tokenizer
        self.format = prompt_format
        self._special = data.special_tokens_in_text
        self._spellings = SpellingFinder(special_tokens(tokenizer.tokenizer))
        self._chat: ChatRenderer | None = None
        if prompt_format.chat_template is not None:
            self._chat = ChatRenderer(
                tokenizer.tokenizer,
                prompt_format.chat_template,
                data.learn,
                data.reasoning,
                prompt_format.clock,
                data.special_tokens_in_text,
            )

    def encode(
        self, examples: Sequence[Example], *, max_length: int, overlong: Overlong
    ) -> EncodedRows:
        """All examples, tokenized in two batches.

        Raises:
            DataError: a row too long under ``overlong=error``; a conversation that the chat
                template cannot write; no row left with anything to learn.
        """
        result = self.encode_some(examples, max_length=max_length, overlong=overlong)
        result.require_rows(max_length)
        return result

    def encode_some(
        self, examples: Sequence[Example], *, max_length: int, overlong: Overlong
    ) -> EncodedRows:
        """The same of some examples of several; there may be nothing to learn in them.

        Raises:
            DataError: as for ``encode``, but for what is left.
        """
        whole = self._whole_rows(examples, max_length)
        rows: list[EncodedRow] = []
        result = EncodedRows(rows=rows, lengths=[len(row) for row in whole])
        if overlong is Overlong.error:
            _check_overlong(whole, max_length)
        for number, row in enumerate(whole):
            if len(row) > max_length and overlong is Overlong.drop:
                result.dropped["overlong"] += 1
                continue
            if not row.spans:
                result.dropped["masked"] += 1
                result.first_masked = result.first_masked or row
                continue
            fitted = truncate(row, max_length)
            result.lost_target_tokens += row.supervised - fitted.supervised
            if not fitted.spans:
                result.dropped["no_target"] += 1
                continue
            result.truncated += len(fitted) < len(row)
            rows.append(fitted)
            result.kept.append(number)
        return result

    def prompt_ids(self, example: Example) -> list[int]:
        """What generation is given: the ids that training saw before an answer to this prompt.

        Args:
            example: a row without its answer, as ``parse_question`` makes it.

        Raises:
            DataError: if the chat template raises.
        """
        if self._chat is not None:
            segments = self._chat.prompt(example.messages, example.source, example.tools)
        else:
            segments = list(self._text(example).segments)
        (ids,) = self._ids([segments or [Segment("", False)]])
        return [token for part in ids for token in part]

    def _whole_rows(self, examples: Sequence[Example], max_length: int) -> list[EncodedRow]:
        texts = [self._text(example) for example in examples]
        clip = self._clip_length([text.segments for text in texts], max_length)
        rows = [[_clipped(segment, clip) for segment in text.segments] for text in texts]
        return [
            self._join(segments, ids, text, example.source)
            for example, text, segments, ids in zip(
                examples, texts, rows, self._ids(rows), strict=True
            )
        ]

    def _ids(self, rows: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Ids of every segment; all first ones in one call of the tokenizer, the rest in two."""
        firsts = iter(self.tokenizer.opening_ids([row[0].text for row in rows]))
        rest = [segment for row in rows for segment in row[1:]]
        plain = iter(self.tokenizer.following_ids([s.text for s in rest if not self._is_text(s)]))
        spelt = iter(self.tokenizer.spelt_ids([s.text for s in rest if self._is_text(s)]))
        return [
            [next(firsts), *(next(spelt if self._is_text(s) else plain) for s in row[1:])]
            for row in rows
        ]

    def _is_text(self, segment: Segment) -> bool:
        return segment.is_text and self._special is SpecialTokens.text

    def _text(self, example: Example) -> RowText:
        """The example's text in segments; the first one never spells a special token."""
        if example.messages:
            if self._chat is None:
                raise DataError("conversations need a chat template", where=example.source)
            if self._special is not SpecialTokens.parse:
                self._check_structures(example)
            row = self._chat.row(example.messages, example.source, example.tools)
        else:
            spelt = [
                place
                for start, end in example.prompt_values
                for place in self._spellings.ranges(example.prompt[start:end], start)
            ]
            prompt = cut(example.prompt, (), spelt)
            answer = cut(
                example.answer, [(0, len(example.answer))], self._spellings.ranges(example.answer)
            )
            earlier = (IN_HISTORY,) * example.history_answers
            row = RowText((*prompt, *answer), len(prompt), unsupervised=earlier)
        if self._special is SpecialTokens.error:
            _check_no_special_token(row, example.source)
        if row.segments and row.segments[0].is_text:
            segments = (Segment("", False), *row.segments)
            row = replace(row, segments=segments, prompt_segments=row.prompt_segments + 1)
        return row

    def _check_structures(self, example: Example) -> None:
        """Tools, keys of arguments and names cannot be cut: no special token in them."""
        calls = [turn.fields.get("tool_calls") for turn in example.messages]
        names = [turn.fields.get(key) for turn in example.messages for key in NAMES]
        written = json.dumps([example.tools, names, *map(_keys_only, calls)], ensure_ascii=False)
        if spelt := self._spellings.ranges(written):
            token = written[slice(*spelt[0])]
            cause = f"the row's tools or names spell the special token {token!r}"
            fix = "rename it there, or set data.special_tokens_in_text=parse"
            raise DataError(cause, where=example.source, fix=fix)

    def _clip_length(self, rows: Sequence[Sequence[Segment]], max_length: int) -> int | None:
        """Characters that surely hold more than ``max_length`` tokens, if any text has more.

        A line of 50 MB would cost the tokenizer gigabytes to no end; its length in tokens is
        then a lower bound.
        """
        longest = max((len(part.text) for parts in rows for part in parts), default=0)
        if longest < 100_000:
            return None
        return (max_length + 1) * self.tokenizer.longest_token()

    def _join(
        self, segments: Sequence[Segment], ids: Sequence[list[int]], text: RowText, source: str
    ) -> EncodedRow:
        input_ids: list[int] = []
        spans: list[tuple[int, int]] = []
        spelt: list[tuple[int, int]] = []
        prompt_length = 0
        for number, (segment, part) in enumerate(zip(segments, ids, strict=True)):
            if number == text.prompt_segments:
                prompt_length = len(input_ids)
            if segment.supervised and part:
                spans.append((len(input_ids), len(input_ids) + len(part)))
            if self._is_text(segment):
                spelt.append((len(input_ids), len(input_ids) + len(part)))
            input_ids += part
        ends_supervised = segments[-1].supervised
        if not text.ended and input_ids[-1:] != [self.tokenizer.end_id]:
            input_ids.append(self.tokenizer.end_id)
            if ends_supervised:
                spans.append((len(input_ids) - 1, len(input_ids)))
        return EncodedRow(
            input_ids,
            learnable(_merged(spans), self._unpredicted(ids)),
            prompt_length,
            source,
            text.spelt,
            text.left_out,
            unanswered=text.unanswered,
            unused_keys=text.unused_keys,
            unsupervised=text.unsupervised,
            dropped_reasoning=text.dropped_reasoning,
            spelt_text=tuple(spelt),
        )

    def _unpredicted(self, ids: Sequence[list[int]]) -> int:
        """Positions at the row's start that nothing predicts: the start token, or the first."""
        start = self.tokenizer.start_ids
        return max(1, len(start) if ids[0][: len(start)] == start else 0)


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that touch as one."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


def _check_no_special_token(row: RowText, source: str) -> None:
    spelt = [segment.text for segment in row.segments if segment.is_text]
    if spelt:
        fix = "set data.special_tokens_in_text to text or parse, or change the row"
        raise DataError(f"the text spells the special token {spelt[0]!r}", where=source, fix=fix)


def _keys_only(value: Any) -> Any:
    """The keys of nested objects, without their values."""
    if isinstance(value, dict):
        return [[key, _keys_only(item)] for key, item in value.items()]
    return [_keys_only(item) for item in value] if isinstance(value, list) else None


def _clipped(segment: Segment, length: int | None) -> Segment:
    if length is None or len(segment.text) <= length:
        return segment
    return replace(segment, text=segment.text[:length])


def _check_overlong(rows: Sequence[EncodedRow], max_length: int) -> None:
    long = [row for row in rows if len(row) > max_length]
    fix = "raise data.max_length, or set data.overlong to truncate or drop"
    raise_first(
        [
            DataError(
                f"{len(row)} tokens, data.max_length is {max_length}", where=row.source, fix=fix
            )
            for row in long[:ERRORS_SHOWN]
        ],
        total=len(long),
    )
