"""A conversation with every text replaced by a numbered mark.

A chat template does to a mark what it does to a text: it puts it somewhere, trims around it, or
leaves it out.  Rendering the marks therefore shows where a template writes which text, however
often the same words occur elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratune.data.conversations import REASONING
from loratune.data.reasoning import TAGS, find_tags, split_reasoning
from loratune.data.segments import Range, SpellingFinder
from loratune.errors import DataError

Turns = list[dict[str, Any]]

_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xF0100))
_TURN_NAMES = {"role", "name", "tool_call_id"}
_CALL_NAMES = frozenset({"id", "type"})
"""Keys of a turn, and of a call, whose values are not text; a function's name is."""
_SHORTEST_KEYWORD = 2
_PLAIN_WORD = re.compile(r"[\w\s]*")


@dataclass(frozen=True, slots=True)
class Word:
    """One stretch of a turn's text, without the white space around it.

    Attributes:
        turn: which turn it belongs to.
        field: under which key of the turn: ``content``, ``reasoning_content``, ``tool_calls``.
        text: the characters.
        is_reasoning: whether it is what the assistant thinks, not what it says: under a key of
            its own, or in the content in front of ``</think>``.
        lead: what its field holds in front of it, back to the word before: white space and
            keywords of the template.
        trail: what its field holds behind it, up to the next word.
    """

    turn: int
    field: str
    text: str
    is_reasoning: bool = False
    lead: str = ""
    trail: str = ""


@dataclass(frozen=True)
class TemplateWords:
    """What in a text is more than text to a chat template.

    Attributes:
        keywords: what the template looks for in texts, longest first.
        spellings: finds special tokens, and other tokens that the template looks for.
        reasoning_opened: whether its generation header opens the assistant's reasoning.
    """

    keywords: Sequence[str] = ()
    spellings: SpellingFinder = field(default_factory=SpellingFinder)
    reasoning_opened: bool = False


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Turns in which marks stand for texts.

    Attributes:
        turns: as the template is given them.
        words: the text behind each mark, by its number.
        mark: matches a mark; group 1 is its number.
        left: begins every mark and stands nowhere else.
        keyword_tokens: special tokens that texts spell and the template looks for, each with the
            number of its turn; those of reasoning in its place are not among them.
    """

    turns: Turns
    words: tuple[Word, ...]
    mark: re.Pattern[str]
    left: str
    keyword_tokens: tuple[tuple[int, str], ...] = ()

    def key(self, tools: object) -> str:
        """What decides how the template renders it."""
        return repr([self.turns, tools, [word.turn for word in self.words]])


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
    keywords = {w for w in words if len(w) >= _SHORTEST_KEYWORD and not _PLAIN_WORD.fullmatch(w)}
    return sorted(keywords.union(TAGS), key=len, reverse=True)


def make_skeleton(
    turns: Sequence[Mapping[str, Any]],
    words: TemplateWords,
    *,
    marked: Callable[[int], bool],
    context: object = None,
    tokens_are_words: bool = True,
) -> Skeleton:
    """Replace the texts of the turns for which ``marked`` holds; names and ids stay.

    Args:
        turns: the conversation as the template is given it.
        words: what the template looks for in texts.
        marked: whether the turn of this number is replaced; others stay as they are.
        context: what else the template writes (tools).
        tokens_are_words: whether special tokens that texts spell are replaced with the words
            around them although the template looks for them, so that it cannot see them.

    Raises:
        DataError: if the conversation uses up every character that could begin a mark.
    """
    marker = _Marker(words, _unused_brackets([*turns, context]), tokens_are_words)
    result = [
        marker.replace_turn(number, turn) if marked(number) else dict(turn)
        for number, turn in enumerate(turns)
    ]
    tokens = tuple(marker.keyword_tokens)
    return Skeleton(result, tuple(marker.words), marker.pattern, marker.left, tokens)


class _Marker:
    """Replaces texts by marks, numbered throughout the conversation."""

    def __init__(
        self, looked_for: TemplateWords, brackets: tuple[str, str], tokens_are_words: bool
    ) -> None:
        self._looked_for, self._tokens_are_words = looked_for, tokens_are_words
        self._splitter = re.compile("|".join(map(re.escape, looked_for.keywords)))
        self.keyword_tokens: list[tuple[int, str]] = []
        self.left, self._right = brackets
        self.words: list[Word] = []
        self.pattern = re.compile(f"{self.left}([0-9]+){self._right}")

    def replace_turn(self, number: int, turn: Mapping[str, Any]) -> dict[str, Any]:
        """The turn with marks in the place of its texts."""

        def replaced(value: Any, field: str, names: frozenset[str]) -> Any:
            if isinstance(value, str):
                return self._replace(value, number, field, turn["role"] == "assistant")
            if isinstance(value, list):
                return [replaced(item, field, names) for item in value]
            if isinstance(value, dict):
                return {
                    key: item
                    if key in names
                    else replaced(item, field, names if key != "arguments" else frozenset())
                    for key, item in value.items()
                }
            return value

        return {
            key: value if key in _TURN_NAMES else replaced(value, key, _CALL_NAMES)
            for key, value in turn.items()
        }

    def _replace(self, text: str, turn: int, field: str, is_assistant: bool) -> str:
        thought, tags = 0, list[Range]()
        if is_assistant and field in REASONING:
            thought = len(text)
        elif is_assistant and field == "content":
            opened = self._looked_for.reasoning_opened
            found = find_tags(text, opened=opened)
            tags = [place for place in (found.opening, found.closing) if place and found.closing]
            thought = len(split_reasoning(text, opened=opened)[0])
        keywords = [match.span() for match in self._splitter.finditer(text)]
        tokens = [place for place in self._looked_for.spellings.ranges(text) if place not in tags]
        met = [one for one in tokens if any(_overlap(one, other) for other in keywords)]
        self.keyword_tokens += [(turn, text[slice(*place)]) for place in met]
        if self._tokens_are_words:
            keywords = [k for k in keywords if not any(_overlap(k, one) for one in met)]
        written, passed = "", 0
        for stretch in _stretches(text, keywords):
            if isinstance(stretch, str):
                written, passed = written + stretch, passed + len(stretch)
                continue
            word, lead, trail = stretch
            written += f"{self.left}{len(self.words)}{self._right}"
            self.words.append(Word(turn, field, word, passed < thought, lead, trail))
            passed += len(word)
        return written


def _overlap(one: Range, other: Range) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _stretches(text: str, keywords: Sequence[Range]) -> list[str | tuple[str, str, str]]:
    """A text cut into what stays and what is marked, in order.

    Args:
        text: the characters.
        keywords: character ranges that stay.

    Returns:
        Strings for what stays; ``(word, lead, trail)`` for what a mark replaces.
    """
    cuts = [0, *(edge for place in keywords for edge in place)]
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


def _unused_brackets(content: Sequence[object]) -> tuple[str, str]:
    """Two private-use characters that occur nowhere in the conversation."""
    characters = set(json.dumps(content, ensure_ascii=False, default=str))
    unused = [chr(code) for code in _PRIVATE_USE if chr(code) not in characters][:2]
    if len(unused) < 2:
        cause = "the conversation uses every private-use character"
        raise DataError(cause, fix="remove characters without a meaning from the row")
    return unused[0], unused[1]
