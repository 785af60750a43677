"""A conversation with every text replaced by a numbered mark.

A chat template does to a mark what it does to a text: it puts it somewhere, trims around it, or
leaves it out.  Rendering the marks therefore shows where a template writes which text, however
often the same words occur elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turns = list[dict[str, Any]]

_BRACKETS = [("\ue000", "\ue001"), ("\uf0f0", "\uf0f1"), ("\uf5a2", "\uf5a7")]
"""Pairs of private-use characters; a pair that occurs in the conversation is not used."""
_NOT_TEXT = {"role", "id", "tool_call_id", "type"}
_SHORTEST_KEYWORD = 2
_PLAIN_WORD = re.compile(r"[\w\s]*")


@dataclass(frozen=True, slots=True)
class Word:
    """One stretch of a turn's text, without the white space around it.

    Attributes:
        turn: which turn it belongs to.
        field: under which key of the turn: ``content``, ``reasoning_content``, ``tool_calls``.
        text: the characters.
        lead: what its field holds in front of it, back to the word before: white space and
            keywords of the template.
        trail: what its field holds behind it, up to the next word.
    """

    turn: int
    field: str
    text: str
    lead: str = ""
    trail: str = ""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Turns in which marks stand for texts.

    Attributes:
        turns: as the template is given them.
        words: the text behind each mark, by its number.
        mark: matches a mark; group 1 is its number.
    """

    turns: Turns
    words: tuple[Word, ...]
    mark: re.Pattern[str]

    def key(self, tools: object) -> str:
        """What decides how the template renders it."""
        return json.dumps([self.turns, tools, [w.turn for w in self.words]], default=str)


def template_keywords(template: str) -> list[str]:
    """Strings that a template looks for in texts: it compares with them, or splits at them.

    They are not replaced by marks: the template's branches would change.  Plain words (roles,
    names of keys) are left out.
    """
    from jinja2 import nodes

    from loratune.data.rendering import parse_template

    tree = parse_template(template)
    words = {
        constant.value.strip()
        for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test))
        for constant in node.find_all(nodes.Const)
        if isinstance(constant.value, str)
    }
    keywords = (w for w in words if len(w) >= _SHORTEST_KEYWORD and not _PLAIN_WORD.fullmatch(w))
    return sorted(keywords, key=len, reverse=True)


def make_skeleton(
    turns: Sequence[Mapping[str, Any]], keywords: Sequence[str], *, marked: Callable[[int], bool]
) -> Skeleton:
    """Replace the texts of the turns for which ``marked`` holds.

    Args:
        turns: the conversation as the template is given it.
        keywords: what the template looks for, longest first.
        marked: whether the turn of this number is replaced; others stay as they are.
    """
    left, right = _unused_brackets(turns)
    splitter = re.compile("|".join(map(re.escape, keywords))) if keywords else None
    words: list[Word] = []

    def replaced(value: Any, turn: int, field: str) -> Any:
        if isinstance(value, str):
            written = []
            for stretch in _stretches(value, splitter):
                if isinstance(stretch, str):
                    written.append(stretch)
                    continue
                written.append(f"{left}{len(words)}{right}")
                words.append(Word(turn, field, *stretch))
            return "".join(written)
        if isinstance(value, list):
            return [replaced(item, turn, field) for item in value]
        if isinstance(value, dict):
            return {k: v if k in _NOT_TEXT else replaced(v, turn, field) for k, v in value.items()}
        return value

    result = [
        {
            key: value if key in _NOT_TEXT or not marked(number) else replaced(value, number, key)
            for key, value in turn.items()
        }
        for number, turn in enumerate(turns)
    ]
    return Skeleton(result, tuple(words), re.compile(f"{left}([0-9]+){right}"))


def _stretches(text: str, splitter: re.Pattern[str] | None) -> list[str | tuple[str, str, str]]:
    """A text cut into what stays and what is marked, in order.

    Returns:
        Strings for what stays; ``(word, lead, trail)`` for what a mark replaces.
    """
    cuts = [0]
    for match in splitter.finditer(text) if splitter else ():
        cuts += match.span()
    parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    if not any(part.strip() for part in parts[::2]):  # nothing but keywords: all of it is a word
        parts = [text]
    pieces: list[str] = []
    for number, part in enumerate(parts):
        core = part.strip() if number % 2 == 0 else ""
        before, _, after = part.partition(core) if core else (part, "", "")
        pieces += [before, core, after] if core else ["", "", part]
    return _joined(pieces)


def _joined(pieces: list[str]) -> list[str | tuple[str, str, str]]:
    """Triples of (stays, word, stays) joined: what lies between two words is one string."""
    words = [core for core in pieces[1::3] if core]
    between, current = [], ""
    for before, core, after in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        current += before
        if core:
            between.append(current)
            current = ""
        current += after
    between.append(current)
    joined: list[str | tuple[str, str, str]] = [between[0]]
    for word, lead, trail in zip(words, between, between[1:], strict=False):
        joined += [(word, lead, trail), trail]
    return joined


def _unused_brackets(turns: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    text = json.dumps(list(turns), ensure_ascii=False, default=str)
    return next(
        (pair for pair in _BRACKETS if pair[0] not in text and pair[1] not in text), _BRACKETS[0]
    )
