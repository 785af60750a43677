"""Examples to ids, with what is supervised marked by position, never by token id.

A row longer than ``max_length`` loses its end: what is left of it begins exactly as generation
begins, with the whole prompt.  A row whose prompt alone fills ``max_length`` has nothing left to
learn and is dropped as ``no_target``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratune.config.schema import Overlong, RowFormat
from loratune.data.chat import ChatRenderer, Segment
from loratune.data.encoded_rows import (
    EncodedRow,
    EncodedRows,
    learnable,
    length_to_keep,
    truncate,
)
from loratune.data.rows import ERRORS_SHOWN, Example, Message, raise_first
from loratune.data.templates import PromptFormat, as_text
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import DataError


class Encoder:
    """Examples of one format to ids."""

    def __init__(self, tokenizer: RowTokenizer, prompt_format: PromptFormat) -> None:
        self.tokenizer = tokenizer
        self.format = prompt_format
        self._chat: ChatRenderer | None = None
        if prompt_format.chat_template is not None:
            self._chat = ChatRenderer(tokenizer.tokenizer, prompt_format.chat_template)

    def encode(
        self, examples: Sequence[Example], *, max_length: int, overlong: Overlong
    ) -> EncodedRows:
        """All examples, tokenized in two batches.

        Raises:
            DataError: a row too long under ``overlong=error``; a conversation that the chat
                template cannot write; no row left with anything to learn.
        """
        whole = self._whole_rows(examples, max_length)
        result = EncodedRows(lengths=[len(row) for row in whole])
        if overlong is Overlong.error:
            _check_overlong(whole, max_length)
        for number, row in enumerate(whole):
            if len(row) > max_length and overlong is Overlong.drop:
                result.dropped["overlong"] += 1
                continue
            fitted = truncate(row, max_length)
            result.lost_target_tokens += row.supervised - fitted.supervised
            if not fitted.spans:
                result.dropped["no_target"] += 1
                continue
            result.truncated += len(fitted) < len(row)
            result.rows.append(fitted)
            result.kept.append(number)
        if examples and not result.rows:
            raise _nothing_left(result, max_length)
        return result

    def prompt_ids(self, columns: Mapping[str, Any], source: str = "") -> list[int]:
        """What generation is given: the ids that training saw before an answer to this prompt.

        Args:
            columns: a row without its answer; for conversations ``messages``, or ``prompt`` as
                the one turn of a user.
            source: named in errors.

        Raises:
            ConfigError: if the template needs a column that is missing.
            DataError: if the chat template raises.
        """
        if self._chat is not None:
            given = columns.get("messages") or [
                {"role": "user", "content": as_text(columns.get("prompt"), "prompt")}
            ]
            turns = [Message(turn["role"], turn["content"]) for turn in given]
            return self._joined(self._chat.prompt(turns, source))
        if self.format.format is RowFormat.text:
            text = as_text(columns.get("prompt", columns.get("text")), "prompt")
        else:
            text = self.format.prompt(columns)
        return self._joined([text])

    def _joined(self, texts: Sequence[str]) -> list[int]:
        opening = self.tokenizer.opening_ids(list(texts[:1]) or [""])
        return [
            token for ids in (*opening, *self.tokenizer.following_ids(texts[1:])) for token in ids
        ]

    def _whole_rows(self, examples: Sequence[Example], max_length: int) -> list[EncodedRow]:
        cut = [self._segments(example) for example in examples]
        clip = self._clip_length(cut, max_length)
        rows = [[_clipped(segment, clip) for segment in segments] for segments, _ in cut]
        opening = self.tokenizer.opening_ids([segments[0].text for segments in rows])
        texts = [segment.text for segments in rows for segment in segments[1:]]
        following = iter(self.tokenizer.following_ids(texts))
        encoded = []
        for example, segments, (_, ended), first in zip(examples, rows, cut, opening, strict=True):
            ids = [first, *(next(following) for _ in segments[1:])]
            encoded.append(self._join(segments, ids, ended, example.source))
        return encoded

    def _segments(self, example: Example) -> tuple[list[Segment], bool]:
        """The example's text in stretches, and whether its end token is already written."""
        if example.messages:
            if self._chat is None:
                raise DataError("conversations need a chat template", where=example.source)
            return self._chat.segments(example.messages, example.source)
        segments = [Segment(example.prompt, False), Segment(example.answer, True)]
        return [segment for segment in segments if segment.text], False

    def _clip_length(
        self, rows: Sequence[tuple[list[Segment], bool]], max_length: int
    ) -> int | None:
        """Characters that surely hold more than ``max_length`` tokens, if any text has more.

        A line of 50 MB would cost the tokenizer gigabytes to no end; its length in tokens is
        then a lower bound.
        """
        longest = max((len(part.text) for parts, _ in rows for part in parts), default=0)
        if longest < 100_000:
            return None
        return (max_length + 1) * self.tokenizer.longest_token()

    def _join(
        self, segments: Sequence[Segment], ids: Sequence[list[int]], ended: bool, source: str
    ) -> EncodedRow:
        input_ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for segment, part in zip(segments, ids, strict=True):
            if segment.supervised:
                spans.append((len(input_ids), len(input_ids) + len(part)))
            input_ids += part
        if not spans:
            raise DataError("nothing to learn in this row", where=source)
        if not ended and input_ids[-1:] != [self.tokenizer.end_id]:
            input_ids.append(self.tokenizer.end_id)
            spans[-1] = (spans[-1][0], len(input_ids))
        return EncodedRow(input_ids, learnable(spans, self._unpredicted(ids)), spans[-1][0], source)

    def _unpredicted(self, ids: Sequence[list[int]]) -> int:
        """Positions at the row's start that nothing predicts: the start token, or the first."""
        start = self.tokenizer.start_ids
        return max(1, len(start) if ids[0][: len(start)] == start else 0)


def _clipped(segment: Segment, length: int | None) -> Segment:
    if length is None or len(segment.text) <= length:
        return segment
    return Segment(segment.text[:length], segment.supervised)


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


def _nothing_left(result: EncodedRows, max_length: int) -> DataError:
    total = len(result.lengths)
    keep = ", ".join(
        f"{length_to_keep(result.lengths, share)} keeps {share:.0%}" for share in (0.95, 0.99, 1.0)
    )
    lost = sum(result.dropped.values())
    return DataError(
        f"{lost}/{total} rows have no supervised token within data.max_length={max_length}",
        where="data.max_length",
        fix=f"raise it: {keep} of the rows whole",
    )
