"""Where in a rendered conversation each assistant turn lies: by construction, never by search.

The conversation is rendered twice, once with every text replaced by a mark.  Putting the texts
back in the places of their marks must give the real rendering, to the character: that proves where
every text stands.  What the assistant writes then begins behind the template's own generation
header and ends with the template's own end of the turn.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from loratune.data.skeleton import Skeleton, Turns, Word, make_skeleton, template_keywords
from loratune.errors import DataError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""Renders turns; the flag asks for the header of the assistant's next turn."""
_REMEMBERED = 512
_SHOWN = 40


class Placed(NamedTuple):
    """One text in the real rendering."""

    word: Word
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """What the assistant writes in one turn.

    Attributes:
        turn: number of the turn.
        start: first character: behind the generation header.
        end: behind the token that ends the turn, or behind its last word.
    """

    turn: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, with the place of everything in it.

    Attributes:
        text: the whole.
        words: every text of a turn, in order; those that the template leaves out are missing.
        spans: one for each assistant turn.
    """

    text: str
    words: tuple[Placed, ...]
    spans: tuple[TurnSpan, ...]


class _Outline(NamedTuple):
    """A rendered skeleton: its text, its marks ``(start, end, number)``, its spans."""

    text: str
    marks: tuple[tuple[int, int, int], ...]
    spans: tuple[TurnSpan, ...]


class SpanFinder:
    """Finds the assistant's spans under one chat template.

    Args:
        template: its source.
        stops: the tokenizer's special tokens.
    """

    def __init__(self, template: str, stops: Sequence[str]) -> None:
        self._keywords = template_keywords(template)
        self._stops = sorted(stops, key=len, reverse=True)
        self._outlines: OrderedDict[str, _Outline] = OrderedDict()

    def locate(
        self, turns: Sequence[Mapping[str, Any]], render: Render, *, context: object = None
    ) -> Rendering:
        """Render a conversation and say where everything stands.

        Args:
            turns: as the template is given them.
            render: renders turns under this template.
            context: whatever else the rendering depends on (tools).

        Raises:
            DataError: if the template changes or leaves out what a turn says.
        """
        full = render(turns, False)
        try:
            return self._located(full, turns, render, lambda _: True, context)
        except DataError:
            # A template may branch on what somebody else's turn says; its text then stays.
            marked = {n for n, turn in enumerate(turns) if turn["role"] == "assistant"}
            return self._located(full, turns, render, marked.__contains__, context)

    def _located(
        self,
        full: str,
        turns: Sequence[Mapping[str, Any]],
        render: Render,
        marked: Callable[[int], bool],
        context: object,
    ) -> Rendering:
        skeleton = make_skeleton(turns, self._keywords, marked=marked)
        outline = self._outline(skeleton, render, context)
        words = _put_back(full, outline, skeleton)
        _check_nothing_left_out(skeleton, words)
        return Rendering(full, words, tuple(_mapped(outline, words)))

    def _outline(self, skeleton: Skeleton, render: Render, context: object) -> _Outline:
        key = skeleton.key(context)
        if key not in self._outlines:
            self._outlines[key] = self._make_outline(skeleton, render)
            if len(self._outlines) > _REMEMBERED:
                self._outlines.popitem(last=False)
        self._outlines.move_to_end(key)
        return self._outlines[key]

    def _make_outline(self, skeleton: Skeleton, render: Render) -> _Outline:
        text = render(skeleton.turns, False)
        marks = _marks(text, skeleton)
        spans: list[TurnSpan] = []
        for number, turn in enumerate(skeleton.turns):
            own = _own_marks(marks, skeleton, number)
            if turn["role"] != "assistant" or not own:
                continue
            previous = spans[-1].end if spans else 0
            header = _header(skeleton.turns[:number], render)
            start = self._start(text, header, previous, own[0], skeleton)
            end = self._end(text, header, own, skeleton, number, render)
            spans.append(TurnSpan(number, start, end))
        _check_no_other_turn(spans, marks, skeleton)
        return _Outline(text, marks, tuple(spans))

    def _start(
        self, text: str, header: str, previous: int, first: tuple[int, int, int], skeleton: Skeleton
    ) -> int:
        """Behind the generation header, or at the first word where the template writes none."""
        place = first[0]
        lead = skeleton.words[first[2]].lead
        if lead and text.endswith(lead, previous, place):
            place -= len(lead)
        stretch = text[previous : first[0]]
        shortest = self._shortest_header(header)
        for length in range(len(header), shortest - 1, -1):
            at = stretch.rfind(header[:length])
            if at >= 0:
                return previous + at + length
        # The model writes the space behind a header that ends without one: tokens begin with it.
        return previous + len(text[previous:place].rstrip(" "))

    def _shortest_header(self, header: str) -> int:
        """How much of a header must be there: through its first special token, else all of it."""
        ends = [at + len(stop) for stop in self._stops if (at := header.find(stop)) >= 0]
        return max(1, min(ends, default=len(header))) if header.strip() else len(header) + 1

    def _end(
        self,
        text: str,
        header: str,
        own: Sequence[tuple[int, int, int]],
        skeleton: Skeleton,
        number: int,
        render: Render,
    ) -> int:
        """Behind the token that ends the turn, or behind its last word and the margin after it."""
        last = own[-1]
        alone = render(skeleton.turns[: number + 1], False)
        own_alone = _own_marks(_marks(alone, skeleton), skeleton, number)
        rest = text[last[1] :]
        tail = rest[: _shared_length(rest, alone[own_alone[-1][1] :])] if own_alone else ""
        closing = [stop for stop in self._stops if stop not in header]
        places = [(at, stop) for stop in closing if (at := tail.find(stop)) >= 0]
        if not places:
            margin = rest[: len(rest) - len(rest.lstrip())]
            places = [(len(margin), stop) for stop in closing if rest.startswith(stop, len(margin))]
        if not places:
            trail = skeleton.words[last[2]].trail
            return last[1] + (len(trail) if trail and rest.startswith(trail) else 0)
        at, stop = min(places, key=lambda place: (place[0], -len(place[1])))
        end = at + len(stop)
        while more := next((s for s in closing if tail.startswith(s, end)), ""):
            end += len(more)
        return last[1] + end


def _marks(text: str, skeleton: Skeleton) -> tuple[tuple[int, int, int], ...]:
    return tuple((*m.span(), int(m.group(1))) for m in skeleton.mark.finditer(text))


def _own_marks(
    marks: Sequence[tuple[int, int, int]], skeleton: Skeleton, turn: int
) -> list[tuple[int, int, int]]:
    """A turn's marks, each where it first stands: a later turn may name the call it answers."""
    first: dict[int, tuple[int, int, int]] = {}
    for mark in marks:
        if skeleton.words[mark[2]].turn == turn:
            first.setdefault(mark[2], mark)
    return list(first.values())


def _header(before: Turns, render: Render) -> str:
    """What the template writes before the assistant begins, or nothing."""
    if not before:
        return ""
    plain, asked = render(before, False), render(before, True)
    return asked[len(plain) :] if asked.startswith(plain) else ""


def _shared_length(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    differing = (place for place, pair in pairs if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))


def _spellings(word: Word) -> list[str]:
    """How a template may write a text: as it is, or inside the JSON of a call."""
    if word.field == "content":
        return [word.text]
    escaped = (json.dumps(word.text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return [word.text, *escaped]


def _put_back(full: str, outline: _Outline, skeleton: Skeleton) -> tuple[Placed, ...]:
    """Every text in the place of its mark; together they must be the real rendering."""
    placed: list[Placed] = []
    done, position = 0, 0
    for start, end, number in outline.marks:
        word = skeleton.words[number]
        literal = outline.text[done:start]
        if not full.startswith(literal, position):
            raise _changed(placed[-1].word if placed else word)
        position += len(literal)
        spelling = next((s for s in _spellings(word) if full.startswith(s, position)), None)
        if spelling is None:
            raise _changed(word, full[position : position + _SHOWN])
        placed.append(Placed(word, position, position + len(spelling)))
        position, done = position + len(spelling), end
    if full[position:] != outline.text[done:]:
        raise _changed(placed[-1].word if placed else Word(0, "content", ""))
    return tuple(placed)


def _mapped(outline: _Outline, words: Sequence[Placed]) -> list[TurnSpan]:
    """The outline's spans in the real rendering."""

    def real(place: int) -> int:
        shift = 0
        for (_, end, _), word in zip(outline.marks, words, strict=True):
            if end > place:
                break
            shift = word.end - end
        return place + shift

    return [TurnSpan(span.turn, real(span.start), real(span.end)) for span in outline.spans]


def _check_no_other_turn(
    spans: Sequence[TurnSpan], marks: Sequence[tuple[int, int, int]], skeleton: Skeleton
) -> None:
    for span in spans:
        for start, end, number in marks:
            other = skeleton.words[number].turn
            if start < span.end and end > span.start and other != span.turn:
                cause = f"the chat template writes turn {other + 1} inside turn {span.turn + 1}"
                raise DataError(cause, fix="mark the assistant's part with {% generation %}")


def _check_nothing_left_out(skeleton: Skeleton, placed: Sequence[Placed]) -> None:
    """What a turn says must stand in the rendering; dropping reasoning is the template's right."""
    written = {id(one.word) for one in placed}
    for word in skeleton.words:
        if id(word) not in written and not is_reasoning(word):
            role = skeleton.turns[word.turn]["role"]
            cause = f"the chat template leaves out {word.text[:_SHOWN]!r} of turn {word.turn + 1}"
            fix = "use a template that writes it, or remove it from the row"
            raise DataError(f"{cause} ({role})", fix=fix)


def is_reasoning(word: Word) -> bool:
    """Whether a text is what the assistant thinks, not what it says.

    It stands under a key of its own, or in the content in front of the keyword at which the
    template splits (``</think>``).
    """
    return (word.field != "content" and "reason" in word.field) or word.trail.strip().startswith(
        "</"
    )


def _changed(word: Word, instead: str = "") -> DataError:
    cause = f"the chat template changes the words of turn {word.turn + 1}: {word.text[:_SHOWN]!r}"
    if instead:
        cause += f" becomes {instead!r}"
    return DataError(cause, fix="use a template that writes the words as they are")
