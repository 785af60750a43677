"""What becomes of every column: used, named as unused, or refused where it changes the meaning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from loratune.config.schema import RowFormat
from loratune.data.conversations import is_turns
from loratune.data.rows import Row, shown
from loratune.data.templates import (
    PLAIN_TEMPLATE,
    PromptFormat,
    is_blank,
    is_number,
    placeholders,
)
from loratune.errors import DataError

REQUIRED = {
    RowFormat.messages: ("messages",),
    RowFormat.prompt: ("prompt", "completion"),
    RowFormat.instruction: ("instruction", "output"),
    RowFormat.text: ("text",),
}
"""The columns of each format, in the order in which formats are recognised."""
TURNS = ("messages", "conversations")
"""Columns of turns: OpenAI's, and ShareGPT's."""
CHANGES_THE_PROMPT = ("system", "history", "tools")
OURS = frozenset(
    {"input", *TURNS, *CHANGES_THE_PROMPT, *(name for names in REQUIRED.values() for name in names)}
)
"""Every name that ``data.columns`` can give to a column, beside a template's placeholders."""
_NAMES_SHOWN = 20


def formats_in(named: Mapping[str, Any]) -> list[RowFormat]:
    """Every format whose columns a row has, the one that is chosen first."""
    listed = is_turns(named.get("prompt")) or is_turns(named.get("completion"))
    found = [
        one
        for one, required in REQUIRED.items()
        if all(column in named for column in required) and not (listed and one is RowFormat.prompt)
    ]
    if RowFormat.messages not in found and (listed or "conversations" in named):
        found.insert(0, RowFormat.messages)
    return found


def used_columns(prompt_format: PromptFormat, named: Collection[str]) -> set[str]:
    """The columns, under our names, that a row of this format is made of."""
    if prompt_format.format is RowFormat.messages:
        turns = next((name for name in TURNS if name in named), None)
        return {"system", "tools", *((turns,) if turns else ("prompt", "completion"))}
    used = {prompt_format.answer}
    for template in (
        prompt_format.template,
        prompt_format.input_template,
        prompt_format.system_template,
    ):
        used.update(placeholders(template or ""))
    return used | ({"history"} if prompt_format.exchange_template else set())


def check_meaning(row: Row, prompt_format: PromptFormat, named: Mapping[str, Any]) -> None:
    """Refuse a row with a system text, earlier turns or tools that the format cannot show.

    Raises:
        DataError: for the first such column.
    """
    used = used_columns(prompt_format, named)
    own_template = prompt_format.input_template is None and prompt_format.template not in (
        None,
        PLAIN_TEMPLATE,
    )
    for name in CHANGES_THE_PROMPT:
        value = named.get(name)
        if name in used or is_blank(value) or value in ([], {}, "[]"):
            continue
        if own_template and name == "system":  # the template's author has left it out
            continue
        theirs = prompt_format.columns.get(name, name)
        cause = f"`{theirs}` changes what is asked, and the format {prompt_format.format} cannot"
        fix = f"set data.columns.{name}= to leave it out"
        if name == "system" and prompt_format.format is not RowFormat.text:
            fix = f"write {{system}} into data.template, or {fix}"
        elif prompt_format.format is not RowFormat.messages:
            fix = f"write the rows as messages, or {fix}"
        raise DataError(f"{cause} use it", where=row.source, fix=fix)


def column_notes(
    rows: Iterable[Row], prompt_format: PromptFormat, *, recognised: bool
) -> tuple[str, ...]:
    """What a person should know about the columns, one sentence each.

    Args:
        rows: as read.
        prompt_format: what they are taken for.
        recognised: whether that was recognised from the columns, and not set.
    """
    formats = dict[RowFormat, None]()
    unused, numbers = Counter[str](), Counter[str]()
    seen: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    count = 0
    for row in rows:
        count += 1
        shape = tuple(row.columns)
        if shape not in seen:
            named = prompt_format.named(row.columns)
            formats.update(dict.fromkeys(formats_in(named)))
            seen[shape] = _divided(prompt_format, named, shape)
        used, rest = seen[shape]
        unused.update(rest)
        numbers.update(name for name in used if _holds_number(row.columns[name]))
    notes = []
    if recognised and len(formats) > 1:
        names = ", ".join("+".join(REQUIRED[one]) for one in REQUIRED if one in formats)
        chosen = prompt_format.format
        notes.append(f"the rows hold several formats ({names}): data.format={chosen} is used")
    if unused:
        notes.append(f"columns not used: {_counted(unused, count)}")
    if numbers:
        notes.append(f"numbers taken as text: {_counted(numbers, 0)}")
    return tuple(notes)


def _divided(
    prompt_format: PromptFormat, named: Mapping[str, Any], columns: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The user's names of the columns that are used, and of the rest."""
    ours = used_columns(prompt_format, named)
    used = {prompt_format.columns.get(name, name) for name in ours}
    return [name for name in columns if name in used], [n for n in columns if n not in used]


def _holds_number(value: object) -> bool:
    if isinstance(value, list) and is_turns(value):
        texts = (turn.get("content", turn.get("value")) for turn in value if isinstance(turn, dict))
        return any(map(is_number, texts))
    return is_number(value)


def _counted(columns: Counter[str], every: int) -> str:
    """Names in their order, each with its number of rows unless it is in every row."""
    words = [
        name if count == every else f"{name} ({count:,} row{'s' if count > 1 else ''})"
        for name, count in ((shown(name)[1:-1], count) for name, count in columns.items())
    ]
    left = len(words) - _NAMES_SHOWN
    return ", ".join(words[:_NAMES_SHOWN]) + (f" and {left} more" if left > 0 else "")
