"""What an assistant thinks before it speaks: under a key of its own, or in tags in the content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratune.config.schema import Reasoning
from loratune.data.conversations import REASONING
from loratune.data.segments import Range
from loratune.errors import DataError

TAGS = ("<think>", "</think>", "[THINK]", "[/THINK]")
_OPENS = re.compile(r"\s*(<think>|\[THINK\])")
_ENDS = re.compile(r"\n?(</think>|\[/THINK\])")


def split_reasoning(content: str) -> tuple[str, str]:
    """What the assistant thinks, with its tags and the white space behind, and what it says.

    The opening tag may stand in the prompt already; the closing one then begins a line.
    """
    end = _ENDS.search(content)
    if end is None or not (_OPENS.match(content) or end.group().startswith("\n")):
        return "", content
    said = content[end.end() :].lstrip()
    return content[: len(content) - len(said)], said


def reasoning_tags(content: str) -> list[Range]:
    """Where in an assistant's content the tags around its reasoning stand, if it has any."""
    thought, _ = split_reasoning(content)
    tags = [_OPENS.match(thought), _ENDS.search(thought)]
    return [tag.span(1) for tag in tags if tag is not None]


def reasoning_key(template: str) -> str | None:
    """The key under which a chat template looks for reasoning, if it does."""
    from jinja2 import nodes

    from loratune.data.rendering import parse_template

    tree = parse_template(template)
    looked_for = {node.attr for node in tree.find_all(nodes.Getattr)}
    looked_for |= {node.value for node in tree.find_all(nodes.Const)}
    return next((key for key in REASONING if key in looked_for), None)


def fit_reasoning(turn: Mapping[str, Any], key: str | None, mode: Reasoning) -> dict[str, Any]:
    """The turn with its reasoning under ``key``, or without it under ``data.reasoning=drop``.

    Raises:
        DataError: if the turn has reasoning under a key, and the template looks for none.
    """
    said = {name: value for name, value in turn.items() if name not in REASONING}
    if turn["role"] != "assistant":
        return said
    names = [key, *REASONING] if key else REASONING
    thought = next((turn[name] for name in names if turn.get(name)), None)
    if mode is Reasoning.drop:
        return {**said, "content": split_reasoning(said["content"])[1]}
    if thought is None:
        return said
    if key is None:
        cause = "the chat template does not write the reasoning of the assistant's turns"
        fix = "set data.reasoning=drop, or use a template that writes it"
        raise DataError(cause, fix=fix)
    return {**said, key: thought}
