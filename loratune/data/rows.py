"""What a row is while it is still text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from loratune.data.not_supervised import WEIGHT
from loratune.errors import DataError, LoratuneError, raise_together

ERRORS_SHOWN = 5
_NAME_SHOWN = 60


class Number(float):
    """A number of a JSON file that Python would write otherwise: ``4.50``, ``1e3``."""

    __slots__ = ("literal",)
    literal: str

    def __new__(cls, literal: str) -> Self:
        """The number, with the characters that it has in the file."""
        number = super().__new__(cls, literal)
        number.literal = str(literal)
        return number

    def __str__(self) -> str:
        return self.literal

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read.

    Attributes:
        columns: column name to value, as in the file.
        source: ``file:line``, for messages.
    """

    columns: Mapping[str, Any]
    source: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that asks or answers nothing.

    Attributes:
        source: ``file:line``.
        why: what of it is empty.
    """

    source: str
    why: str


def left_out_words(reasons: Mapping[str, int]) -> str:
    """``left out: `completion` is empty (2), the row is blank (1)``."""
    return "left out: " + ", ".join(f"{why} ({count:,})" for why, count in reasons.items())


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        content: the text.
        fields: what else the template is given: ``reasoning_content``, ``tool_calls``, ``name``.
        supervised: whether the row wants an assistant turn learnt.
        masked_by: what in the row keeps it out of the loss, where something does.
    """

    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    supervised: bool = True
    masked_by: str = field(default=WEIGHT, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Example:
    """One row whose format is known and whose prompt is written out.

    Attributes:
        source: ``file:line``.
        prompt: the text before the answer; empty for text rows and conversations.
        history_answers: answers that the prompt shows of earlier exchanges.
        prompt_values: where in ``prompt`` the row's own words stand; the rest is the template's.
        answer: the text to learn; empty for conversations.
        messages: the turns of a conversation, else empty.
        tools: definitions of the tools that the conversation may call, for its template.
    """

    source: str
    prompt: str = ""
    answer: str = ""
    prompt_values: tuple[tuple[int, int], ...] = ()
    messages: tuple[Message, ...] = field(default=())
    history_answers: int = 0
    tools: Sequence[Any] | None = field(default=None, hash=False)

    @property
    def question(self) -> tuple[object, ...]:
        """Everything before the last answer: what makes two rows share a prompt."""
        if self.messages:
            tools = json.dumps(self.tools, sort_keys=True) if self.tools else ""
            return (tools, *map(repr, self.messages[: self._last_assistant]))
        return (self.prompt or self.answer,)

    @property
    def plain_question(self) -> tuple[dict[str, str], ...]:
        """Role and content of the turns before the last answer, where that is all there is."""
        asked = self.messages[: self._last_assistant] if self.messages else ()
        if self.tools or any(turn.fields for turn in asked):
            return ()
        return tuple({"role": turn.role, "content": turn.content} for turn in asked)

    @property
    def last_answer(self) -> str:
        """The text that generation is compared with."""
        return self.messages[self._last_assistant].content if self.messages else self.answer

    @property
    def _last_assistant(self) -> int:
        return max(n for n, turn in enumerate(self.messages) if turn.role == "assistant")

    @property
    def content(self) -> tuple[object, ...]:
        """What makes two rows the same row, wherever they stand."""
        return (self.prompt, self.answer, self.messages)


def data_fingerprint(rows: Iterable[Row]) -> str:
    """Hex sha256 over the rows' contents in order; paths and key order play no part."""
    digest = hashlib.sha256()
    for row in rows:
        content = json.dumps(dict(row.columns), sort_keys=True, default=str)
        digest.update(content.encode("utf-8") + b"\n")
    return digest.hexdigest()


def shown(name: object) -> str:
    """``name`` from a user's file, quoted, cut short and free of control characters."""
    text = str(name)
    return repr(text if len(text) <= _NAME_SHOWN else text[:_NAME_SHOWN] + "...")


def listed(names: Iterable[object]) -> str:
    """Names from a user's file as one comma-separated list."""
    return ", ".join(shown(name) for name in names) or "no columns"


def raise_first(errors: Sequence[LoratuneError], total: int | None = None) -> None:
    """Raise the first errors together, with the number of those left out.

    Raises:
        LoratuneError: when ``errors`` is not empty.
    """
    first = list(errors[:ERRORS_SHOWN])
    left = (total or len(errors)) - len(first)
    if first and left > 0:
        first.append(DataError(f"{left:,} more rows have problems like these"))
    raise_together(first)
