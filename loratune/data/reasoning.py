"""What an assistant thinks before it speaks: under a key of its own, or in tags in the content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratune.config.schema import Reasoning
from loratune.data.conversations import REASONING
from loratune.data.segments import Range
from loratune.errors import DataError

_PAIRS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
TAGS = (*_PAIRS, *_PAIRS.values())
_OPENS = re.compile("|".join(map(re.escape, _PAIRS)))
_CLOSES = re.compile("|".join(map(re.escape, _PAIRS.values())))
_LEAD = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around what the assistant thinks.

    Attributes:
        opening: where the opening tag stands at the content's beginning, if it does.
        closing: where the closing tag stands, if it does.
    """

    opening: Range | None
    closing: Range | None


def find_tags(content: str, *, opened: bool) -> ReasoningTags:
    """The tags around reasoning at the beginning of an assistant's content.

    Args:
        content: what the assistant writes.
        opened: whether the template's generation header opens the reasoning.
    """
    lead = _LEAD.match(content)
    opening = _OPENS.match(content, lead.end() if lead else 0)
    if opening:
        end = content.find(_PAIRS[opening.group()], opening.end())
        closing = (end, end + len(_PAIRS[opening.group()])) if end >= 0 else None
        return ReasoningTags(opening.span(), closing)
    closed = _CLOSES.search(content)
    # A tag within a line, of reasoning that nobody opened, is talk about one.
    own = closed and (opened or content.endswith("\n", 0, closed.start()))
    return ReasoningTags(None, closed.span() if closed and own else None)


def opens_reasoning(header: str) -> bool:
    """Whether a text ends with a tag that opens reasoning."""
    return header.rstrip().endswith(tuple(_PAIRS))


def split_reasoning(content: str, *, opened: bool) -> tuple[str, str]:
    """What the assistant thinks, with its tags and the white space behind, and what it says."""
    closing = find_tags(content, opened=opened).closing
    if closing is None:
        return "", content
    said = content[closing[1] :].lstrip()
    return content[: len(content) - len(said)], said


def _check_tags(content: str, opened: bool, mode: Reasoning) -> None:
    """Reasoning can be told from the answer only where both its ends are known."""
    tags = find_tags(content, opened=opened)
    begun = opened or tags.opening is not None
    if tags.closing and not begun:
        tag, fault = content[slice(*tags.closing)], "and neither it nor the template opens it"
    elif tags.opening and not tags.closing:
        tag, fault = content[slice(*tags.opening)], "and does not close it"
    else:
        return
    verb = "closes" if tags.closing else "opens"
    cause = f"the assistant {verb} its reasoning with {tag!r}, {fault}"
    fix = f"data.reasoning={mode} cannot tell it from the answer: write both tags, or remove them"
    raise DataError(cause, fix=fix)


def reasoning_key(template: str) -> str | None:
    """The key under which a chat template looks for reasoning, if it does."""
    from jinja2 import nodes

    from loratune.data.rendering import parse_template

    tree = parse_template(template)
    looked_for = {node.attr for node in tree.find_all(nodes.Getattr)}
    looked_for |= {node.value for node in tree.find_all(nodes.Const)}
    return next((key for key in REASONING if key in looked_for), None)


def fit_reasoning(
    turn: Mapping[str, Any], key: str | None, mode: Reasoning, *, opened: bool
) -> dict[str, Any]:
    """The turn with its reasoning under ``key``, or without it under ``data.reasoning=drop``.

    Args:
        turn: as the template would be given it.
        key: under which the template looks for reasoning.
        mode: the recipe's.
        opened: whether the template's generation header opens the reasoning.

    Raises:
        DataError: if the turn has reasoning under a key, and the template looks for none; if its
            reasoning cannot be told from what it says, or is all that it says, and that matters.
    """
    said = {name: value for name, value in turn.items() if name not in REASONING}
    if turn["role"] != "assistant":
        return said
    names = [key, *REASONING] if key else REASONING
    thought = next((turn[name] for name in names if turn.get(name)), None)
    if mode is not Reasoning.learn:
        _check_tags(said["content"], opened, mode)
    if mode is Reasoning.drop:
        words = split_reasoning(said["content"], opened=opened)[1]
        if not words.strip() and "tool_calls" not in said:
            cause = "the assistant says nothing beside its reasoning"
            raise DataError(cause, fix="remove the turn, or set data.reasoning to learn or context")
        return {**said, "content": words}
    if thought is None:
        return said
    if key is None:
        cause = "the chat template does not write the reasoning of the assistant's turns"
        fix = "set data.reasoning=drop, or use a template that writes it"
        raise DataError(cause, fix=fix)
    return {**said, key: thought}
