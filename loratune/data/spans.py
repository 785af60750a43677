"""Where in a rendered conversation each assistant turn lies: by construction, never by search.

The conversation is rendered twice, once with every text replaced by a mark.  Putting the texts
back in the places of their marks must give the real rendering, to the character: that proves where
every text stands.  What the assistant writes then begins behind the template's own generation
header and ends with the template's own end of the turn.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from loratune.data.probes import Render
from loratune.data.skeleton import Skeleton, TemplateWords, Turns, Word, make_skeleton
from loratune.errors import DataError

_REMEMBERED = 512
_SHOWN = 40
_BORDER = re.compile(r"[\s>\]]")


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
        spans: one for each assistant turn of which the template writes anything.
        left_out: reasoning that the template leaves out; nothing else may be.
    """

    text: str
    words: tuple[Placed, ...]
    spans: tuple[TurnSpan, ...]
    left_out: tuple[Word, ...]


class _Outline(NamedTuple):
    """A rendered skeleton: its text, its marks ``(start, end, number)``, its spans."""

    text: str
    marks: tuple[tuple[int, int, int], ...]
    spans: tuple[TurnSpan, ...]


class SpanFinder:
    """Finds the assistant's spans under one chat template.

    Args:
        words: what the template looks for in texts.
        stops: the tokenizer's special tokens.
        has_marks: whether it marks the assistant's part itself, so that spans may cover more.
        parse_tokens: whether special tokens that texts spell are meant, so that the template may
            act on them.
    """

    def __init__(
        self,
        words: TemplateWords,
        stops: Sequence[str],
        *,
        has_marks: bool = False,
        parse_tokens: bool = False,
    ) -> None:
        self._has_marks, self._parse_tokens = has_marks, parse_tokens
        self._words = words
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

        def skeleton(marked: Callable[[int], bool], *, tokens_are_words: bool) -> Skeleton:
            return make_skeleton(
                turns,
                self._words,
                marked=marked,
                context=context,
                tokens_are_words=tokens_are_words,
            )

        def everyone(_: int) -> bool:
            return True

        with suppress(_WordsChanged):
            whole = skeleton(everyone, tokens_are_words=True)
            return self._located(full, whole, render, context)
        if whole.keyword_tokens:
            with suppress(_WordsChanged):
                seen = skeleton(everyone, tokens_are_words=False)
                rendering = self._located(full, seen, render, context)
                self._check_tokens(seen)
                return rendering
        # A template may branch on what somebody else's turn says; its text then stays.
        own = {n for n, turn in enumerate(turns) if turn["role"] == "assistant"}
        answers = skeleton(own.__contains__, tokens_are_words=True)
        rendering = self._located(full, answers, render, context)
        self._check_unmarked(rendering, turns)
        return rendering

    def _located(self, full: str, skeleton: Skeleton, render: Render, context: object) -> Rendering:
        outline = self._outline(skeleton, render, context)
        words = _put_back(full, outline, skeleton)
        left_out = _left_out(skeleton, words)
        return Rendering(full, words, tuple(_mapped(outline, words)), left_out)

    def _check_tokens(self, skeleton: Skeleton) -> None:
        """A template that acts on a special token takes it for one, which text never is."""
        if not self._parse_tokens:
            number, token = skeleton.keyword_tokens[0]
            cause = f"the chat template acts on {token!r}, which turn {number + 1} spells as text"
            fix = "change the row, or set data.special_tokens_in_text=parse"
            raise DataError(cause, fix=fix)

    def _check_unmarked(self, rendering: Rendering, turns: Sequence[Mapping[str, Any]]) -> None:
        """Texts without a mark must not stand in a span, nor spell what only a mark can tell."""
        for number, turn in enumerate(turns):
            said = str(turn["content"]).strip()
            if turn["role"] == "assistant" or not said:
                continue
            if any(stop in said for stop in self._stops):
                raise _changed(Word(number, "content", said))
            for span in rendering.spans:
                if not self._has_marks and said in _template_text(rendering, span):
                    raise _inside(number, span.turn)

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
            if own[0][0] < previous:
                cause = f"the chat template writes turn {number + 1} before an earlier one"
                raise DataError(cause, fix="use a template that keeps the order of the turns")
            header = _header(skeleton.turns[:number], render)
            start = self._start(text, header, previous, own[0], skeleton)
            end = self._end(text, header, own, skeleton, number, render)
            spans.append(TurnSpan(number, start, end))
        if not self._has_marks:
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
            if length < len(header) and not _BORDER.match(header, length - 1):
                continue  # a turn may begin otherwise than asked for, but not within a tag
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
        """Behind the token that ends the turn, or behind what the turn itself writes last."""
        place = own[-1][1]
        word = skeleton.words[own[-1][2]]
        rest = text[place:]
        tail = self._shared_tail(rest, skeleton, number, render)
        closing = [stop for stop in self._stops if stop not in header]
        inside = [(at, at + len(s)) for s in closing for at in _occurrences(tail, s)]
        if inside:  # a call may hold special tokens of its own; nothing follows them but the end
            end = (max if word.field == "tool_calls" else min)(inside)[1]
            while more := next((s for s in closing if tail.startswith(s, end)), ""):
                end += len(more)
            return place + end
        following = min(((at, -len(s)) for s in closing if (at := rest.find(s)) >= 0), default=None)
        if following and not rest[len(tail) : following[0]].strip():
            return place + following[0] - following[1]
        trail = len(word.trail) if rest.startswith(word.trail) else 0
        return place + max(trail, len(tail.rstrip()))

    def _shared_tail(self, rest: str, skeleton: Skeleton, number: int, render: Render) -> str:
        """What follows a turn's last mark also where something else follows the turn."""
        turns = skeleton.turns[: number + 1]
        if number + 1 == len(skeleton.turns):
            turns = [*turns, {"role": "user", "content": "a"}]
        try:
            other = render(turns, False)
        except DataError:  # the roles must alternate otherwise, for example
            return rest
        own = _own_marks(_marks(other, skeleton), skeleton, number)
        return rest[: _shared_length(rest, other[own[-1][1] :])] if own else ""


def _marks(text: str, skeleton: Skeleton) -> tuple[tuple[int, int, int], ...]:
    return tuple((*m.span(), int(m.group(1))) for m in skeleton.mark.finditer(text))


def _occurrences(text: str, part: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(part), text)]


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
    """How a template may write a text: as it is, or in JSON."""
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
            raise _branches(placed, word)
        position += len(literal)
        spelling = next((s for s in _spellings(word) if full.startswith(s, position)), None)
        if spelling is None:
            following = outline.text[end:].partition(skeleton.left)[0]
            raise _changed(word, full[position:].partition(following or "\n")[0][:_SHOWN])
        placed.append(Placed(word, position, position + len(spelling)))
        position, done = position + len(spelling), end
    if full[position:] != outline.text[done:]:
        raise _branches(placed, Word(0, "content", ""))
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


def _template_text(rendering: Rendering, span: TurnSpan) -> str:
    """What stands in a span and is not the turn's own."""
    own = [word for word in rendering.words if span.start < word.end and word.start < span.end]
    edges = [span.start, *(edge for word in own for edge in (word.start, word.end)), span.end]
    between = zip(edges[::2], edges[1::2], strict=True)
    return "\n".join(rendering.text[start:end] for start, end in between)


def _check_no_other_turn(
    spans: Sequence[TurnSpan], marks: Sequence[tuple[int, int, int]], skeleton: Skeleton
) -> None:
    for span in spans:
        for start, end, number in marks:
            other = skeleton.words[number].turn
            if start < span.end and end > span.start and other != span.turn:
                raise _inside(other, span.turn)


def _inside(other: int, turn: int) -> DataError:
    cause = f"the chat template writes turn {other + 1} inside turn {turn + 1}"
    return DataError(cause, fix="mark the assistant's part with {% generation %}")


def _left_out(skeleton: Skeleton, placed: Sequence[Placed]) -> tuple[Word, ...]:
    """Reasoning that stands nowhere: leaving it out is the template's right, and nothing else."""
    written = {id(one.word) for one in placed}
    missing = tuple(word for word in skeleton.words if id(word) not in written)
    for word in missing:
        if not word.is_reasoning:
            what = "the tool call" if word.field == "tool_calls" else "the words"
            whose = f"turn {word.turn + 1} ({skeleton.turns[word.turn]['role']})"
            cause = f"the chat template leaves out {what} {word.text[:_SHOWN]!r} of {whose}"
            fix = "use a template that writes it, or remove it from the row"
            raise DataError(cause, fix=fix)
    return missing


class _WordsChanged(DataError):
    """A rendering that is not the skeleton's with the words put back."""


def _changed(word: Word, instead: str = "") -> _WordsChanged:
    cause = f"the chat template changes the words of turn {word.turn + 1}: {word.text[:_SHOWN]!r}"
    if instead:
        cause += f" becomes {instead!r}"
    return _WordsChanged(cause, fix="use a template that writes the words as they are")


def _branches(placed: Sequence[Placed], word: Word) -> _WordsChanged:
    """The template looks at the words before the difference, or changes how they end."""
    word = placed[-1].word if placed else word
    cause = f"the chat template writes something else because of what turn {word.turn + 1} says"
    fix = f"use a template that does not change {word.text[:_SHOWN]!r}"
    return _WordsChanged(cause, fix=fix)
