"""Templates that mark the assistant's part themselves, with ``{% generation %}``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratune.data.rendering import FIX, parse_template
from loratune.data.segments import Range
from loratune.data.spans import Rendering, TurnSpan
from loratune.errors import DataError


def has_marks(template: str) -> bool:
    """Whether a chat template marks the assistant's part.

    Raises:
        DataError: if it is not a Jinja template.
        SecurityError: if it is longer than any honest one.
    """
    from jinja2 import nodes

    scopes = parse_template(template).find_all(nodes.Scope)
    return any(type(node) is nodes.Scope for node in scopes)  # no other tag makes one


def marked_spans(
    text: str,
    marks: Iterable[Range],
    rendering: Rendering,
    turns: Sequence[Mapping[str, Any]],
    stops: Sequence[str],
) -> list[TurnSpan]:
    """The template's own marks; parts that touch are one, and each ends behind its end token.

    Args:
        text: the conversation as rendered with marks.
        marks: character ranges inside them.
        rendering: the same conversation, rendered without.
        turns: what was rendered.
        stops: the tokenizer's special tokens.

    Raises:
        DataError: if the marks cover nothing, or the words of somebody else.
    """
    if text != rendering.text:
        raise DataError("the chat template renders something else with its marks", fix=FIX)
    ends = {span.turn: span.end for span in rendering.spans}
    spans: list[TurnSpan] = []
    for start, end in _joined(marks):
        owners = {w.word.turn for w in rendering.words if w.start < end and start < w.end}
        foreign = [n for n in sorted(owners) if turns[n]["role"] != "assistant"]
        if foreign:
            cause = f"the {{% generation %}} marks cover words of turn {foreign[0] + 1}"
            raise DataError(cause, fix=FIX)
        turn = max(owners, default=spans[-1].turn if spans else 0)
        spans.append(TurnSpan(turn, start, _end(text, start, end, ends.get(turn, end), stops)))
    if not spans:
        raise DataError("the {% generation %} marks cover nothing", fix=FIX)
    return spans


def _end(text: str, start: int, end: int, turn_end: int, stops: Sequence[str]) -> int:
    """The end of a marked part, moved to just behind the special token that ends the turn."""
    words = text[start:end].rstrip()
    if any(words.endswith(stop) for stop in stops):
        return start + len(words)
    return turn_end if text[end:turn_end].strip() in stops else end


def _joined(marks: Iterable[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, end in marks:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif start < end:
            joined.append((start, end))
    return joined
