"""The part of Go's ``text/template`` that our Modelfiles use, by its documentation, in Python.

Actions: ``if``, ``else if``, ``else``, ``end``, ``range $i, $m := .Messages``, string literals,
``.Field``, ``$``, ``$variable.Field``, and the functions ``eq``, ``and``, ``not``.  No action here
trims spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_ACTION = re.compile(r"\{\{ ((?:\"(?:\\.|[^\"\\])*\"|[^\"{}])*?) \}\}")
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+')


def render(template: str, data: dict[str, Any]) -> str:
    """What Go writes for ``data``."""
    items = iter(_items(template))
    text, stopped = _body(items, data, {"$": data}, run=True)
    assert stopped is None
    return text


def ollama(template: str, turns: list[dict[str, str]]) -> str:
    """What Ollama sends: all system texts as ``.System``, the turns as ``.Messages``."""
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    messages = [{"Role": turn["role"], "Content": turn["content"]} for turn in turns]
    return render(template, {"System": system, "Messages": messages})


def _items(template: str) -> Iterator[tuple[str, str]]:
    place = 0
    for found in _ACTION.finditer(template):
        if found.start() > place:
            yield "text", template[place : found.start()]
        yield "action", found.group(1)
        place = found.end()
    rest = template[place:]
    assert "{{" not in rest, rest
    if rest:
        yield "text", rest


def _body(items: Any, dot: Any, names: dict[str, Any], *, run: bool) -> tuple[str, str | None]:
    """Text up to the ``else`` or ``end`` that closes this block, and which it was."""
    text = ""
    for kind, content in items:
        if kind == "text":
            text += content if run else ""
        elif content == "end" or content.startswith("else"):
            return text, content
        elif content.startswith("if "):
            text += _if(content[3:], items, dot, names, run=run)
        elif content.startswith("range "):
            text += _range(content, items, dot, names, run=run)
        elif run:
            text += str(_value(content, dot, names))
    return text, None


def _if(condition: str, items: Any, dot: Any, names: dict[str, Any], *, run: bool) -> str:
    holds = run and bool(_value(condition, dot, names))
    text, closed = _body(items, dot, names, run=holds)
    while closed != "end":
        assert closed is not None
        nested = closed.removeprefix("else").strip()
        this = run and not holds
        if nested:
            this = this and bool(_value(nested.removeprefix("if "), dot, names))
        more, closed = _body(items, dot, names, run=this)
        text, holds = text + more, holds or this
    return text


def _range(content: str, items: Any, dot: Any, names: dict[str, Any], *, run: bool) -> str:
    index, item, source = re.fullmatch(r"range (\$\w+), (\$\w+) := (\S+)", content).groups()
    inside = []
    depth = 0
    for kind, action in items:
        if kind == "action" and action == "end" and depth == 0:
            break
        if kind == "action":
            depth += action.startswith(("if ", "range ")) - (action == "end")
        inside.append((kind, action))
    if not run:
        return ""
    return "".join(
        _body(iter(inside), value, {**names, index: place, item: value}, run=True)[0]
        for place, value in enumerate(_value(source, dot, names))
    )


def _value(expression: str, dot: Any, names: dict[str, Any]) -> Any:
    words = _WORD.findall(expression)
    value, rest = _call(words, dot, names)
    assert not rest, expression
    return value


def _call(words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
    functions = {"eq": lambda a, b: a == b, "and": lambda a, b: a and b, "not": lambda a: not a}
    if words[0] not in functions:
        return _operand(words, dot, names)
    arguments, rest = [], words[1:]
    while rest and rest[0] != ")":
        value, rest = _operand(rest, dot, names)
        arguments.append(value)
    return functions[words[0]](*arguments), rest


def _operand(words: list[str], dot: Any, names: dict[str, Any]) -> tuple[Any, list[str]]:
    word, *rest = words
    if word == "(":
        value, rest = _call(rest, dot, names)
        assert rest[0] == ")"
        return value, rest[1:]
    if word.startswith('"'):
        return json.loads(word), rest
    if word.isdigit():
        return int(word), rest
    name, _, field = word.partition(".")
    owner = names[name] if name else dot
    return (owner[field] if field else owner), rest
