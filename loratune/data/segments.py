"""Stretches of a row's text, cut where supervision changes and where special tokens are spelt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row's text.

    Attributes:
        text: the characters.
        supervised: whether they are the model's to write.
        is_text: whether it spells a special token in somebody's words, so that it is not one.
    """

    text: str
    supervised: bool
    is_text: bool = False


def cut(text: str, supervised: Sequence[Range], spelt: Iterable[Range] = ()) -> list[Segment]:
    """``text`` as segments, together the whole.

    Args:
        text: a row.
        supervised: character ranges with loss.
        spelt: character ranges that spell a special token.
    """
    plain = set(spelt)
    edges = {0, len(text), *(edge for part in (*supervised, *plain) for edge in part)}
    cuts = sorted(edge for edge in edges if edge <= len(text))
    return [
        Segment(text[a:b], any(x <= a and b <= y for x, y in supervised), (a, b) in plain)
        for a, b in pairwise(cuts)
    ]


@dataclass(frozen=True, slots=True)
class RowText:
    """A row's text in segments.

    Attributes:
        segments: in order; together the text up to the end of the last answer.
        prompt_segments: how many of them stand before the last answer.
        ended: whether a special token of the template ends the last answer.
        left_out: turns whose reasoning the template leaves out.
        unanswered: turns behind the assistant's last, which are not part of the row's text.
        unused_keys: keys of turns that the template does not write.
        unsupervised: why, one for each assistant turn without loss.
        dropped_reasoning: turns whose reasoning was removed.
    """

    segments: tuple[Segment, ...]
    prompt_segments: int
    ended: bool = False
    left_out: int = 0
    unanswered: int = 0
    unused_keys: tuple[str, ...] = ()
    unsupervised: tuple[str, ...] = ()
    dropped_reasoning: int = 0

    @property
    def spelt(self) -> tuple[str, ...]:
        """The special tokens that the row's words spell."""
        return tuple(dict.fromkeys(s.text for s in self.segments if s.is_text))


class SpellingFinder:
    """Finds special tokens that are spelt in texts.

    Args:
        special_tokens: of the tokenizer.
        others: further tokens that are more than text.
    """

    def __init__(self, special_tokens: Iterable[str] = (), others: Iterable[str] = ()) -> None:
        tokens = sorted({*special_tokens, *others}, key=len, reverse=True)
        pattern = "|".join(map(re.escape, tokens))
        self._pattern = re.compile(pattern) if pattern else None

    def ranges(self, text: str, start: int = 0) -> list[Range]:
        """Where they are, counted from ``start``."""
        matches = self._pattern.finditer(text) if self._pattern else ()
        return [(start + match.start(), start + match.end()) for match in matches]
