"""What a chat template writes around the words of a conversation, read off what it renders.

Ollama runs no Jinja: it has templates in Go's language.  A template whose conversations are turns
in a row, each between two fixed texts, can be written in both; whether this one can is found out by
rendering it, and proved by rendering conversations both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loratune.errors import LoratuneError

Turns = Sequence[Mapping[str, str]]
Render = Callable[[Turns, bool], str]
"""A conversation as the template writes it, with the header of the next answer if asked for."""

_SYSTEM, _ASKED, _ANSWERED, _AGAIN, _LAST = "qsystemq", "qaskedq", "qansweredq", "qagainq", "qlastq"


@dataclass(frozen=True)
class TurnTexts:
    """The fixed texts of a chat template.

    Attributes:
        without_system: what a conversation begins with that has no system text.
        system: before and after a system text, or ``None`` where the template takes none.
        user: before and after a question.
        assistant: before and after an answer; before is the header of the next one, too.
        system_in_user: whether a system text stands inside the first user's turn.
        default_system: the system text that stands where the conversation has none, if any.
    """

    without_system: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    system_in_user: bool = False
    default_system: str = ""

    def rendered(self, turns: Turns) -> str:
        """A conversation, with the header of the next answer."""
        own = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        has_system = turns[0]["role"] == "system"
        text = "" if has_system else self.without_system
        for place, turn in enumerate(turns):
            before, after = own[turn["role"]]
            joined = has_system and self.system_in_user and place == 1
            text += f"{'' if joined else before}{turn['content']}{after}"
        return text + self.assistant[0]


def turn_texts(render: Render, start: str = "") -> TurnTexts | None:
    """A chat template's fixed texts, or ``None`` where a conversation is more than those.

    Args:
        render: the template.
        start: what the tokenizer puts before every text itself: left out here.
    """
    try:
        found = _read(render, start)
        same = found is not None and all(
            found.rendered(turns) == render(turns, True).removeprefix(start)
            for turns in _conversations(with_system=found.system is not None)
        )
    except (LoratuneError, ValueError):
        return None
    return found if same else None


def _read(render: Render, start: str) -> TurnTexts | None:
    asked = _turns(_ASKED, _ANSWERED, _AGAIN, _LAST)
    first, behind_question, behind_answer, _, end = _around(
        render(asked, False).removeprefix(start), (_ASKED, _ANSWERED, _AGAIN, _LAST)
    )
    header = _difference(render(asked[:1], True), render(asked[:1], False))
    before_user = behind_answer.removeprefix(end)
    if not (behind_question.endswith(header) and first.endswith(before_user)):
        return None
    user = before_user, behind_question.removesuffix(header)
    texts = TurnTexts(first.removesuffix(before_user), None, user, (header, end))
    try:
        whole = render([_turn("system", _SYSTEM), *asked], False).removeprefix(start)
    except LoratuneError:
        return texts  # this template takes no system text
    before, after, *_ = _around(whole, (_SYSTEM, _ASKED))
    joined = not after.endswith(before_user)
    after = after if joined else after.removesuffix(before_user)
    default = texts.without_system
    own = default[len(before) : len(default) - len(after)]
    if not (default.startswith(before) and default.endswith(after) and not joined):
        own = ""
    return TurnTexts(default, (before, after), user, (header, end), joined, own)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [_turn(roles[place % 2], content) for place, content in enumerate(contents)]


def _around(text: str, words: Sequence[str]) -> list[str]:
    """The text before, between and after words that each occur once, in this order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise ValueError(word)
        parts.append(before)
    return [*parts, text]


def _difference(longer: str, shorter: str) -> str:
    if not longer.startswith(shorter):
        raise ValueError("the header of an answer changes what is before it")
    return longer.removeprefix(shorter)


def _conversations(*, with_system: bool) -> list[list[dict[str, str]]]:
    contents = (
        'Is {{x}} "quoted"?',
        "Yes:\n\n  it's `1 < 2`.",
        "Gut, schöne Grüße 😀",
        "Ok",
        "So?",
    )
    conversations = [_turns(*contents[:count]) for count in (1, 3, 5)]
    if with_system:
        system = _turn("system", "Be brief.\nAnswer {in} \\ English.")
        conversations += [[system, *turns] for turns in conversations]
    return conversations


def strips_spaces(render: Render) -> bool:
    """Whether the template takes spaces around a message away, which Go's templates do not."""
    text = render([_turn("user", f"  {_ASKED}  ")], True)
    return f"  {_ASKED}  " not in text
