"""Turns of a conversation, as the formats of the field write them.

``messages`` (role, content), ShareGPT's ``conversations`` (from, value), and TRL's lists of
messages in ``prompt`` and ``completion``.  Every key of a turn is used, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratune.data.json_rows import parse_json
from loratune.data.not_supervised import TRAIN, WEIGHT
from loratune.data.rows import Message, listed, shown
from loratune.data.templates import as_text, is_blank
from loratune.errors import DataError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which chat templates look for what the assistant thinks."""
_SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_CALLS = "function_call"
"""The role of ShareGPT's turns that are calls of tools, written as JSON."""
_CHOICE = ("weight", "train")
NAMES = ("name", "tool_call_id")
"""Keys of a turn that a template may write, or do without."""
_PASSED_ON = ("tool_calls", *NAMES, *REASONING)
_DEEPEST = 100
"""Levels of lists and objects in a call or a tool; a template walks through them by recursion."""


def read_turns(turns: object, column: str) -> tuple[Message, ...]:
    """A column of turns, checked.

    Raises:
        DataError: for what is not a turn, an unknown role, an empty turn, or an unknown key.
    """
    if not isinstance(turns, list):
        cause = f"`{column}` is a {type(turns).__name__}, not a list of turns"
        role = "assistant" if column == "completion" else "user"
        raise DataError(cause, fix=f'write [{{"role": "{role}", "content": ...}}, ...]')
    return tuple(_turn(number, turn) for number, turn in enumerate(turns, start=1))


def read_tools(tools: object) -> list[Any] | None:
    """A column of tool definitions: a list, or one written as JSON.

    Raises:
        DataError: if it is neither.
    """
    value = _parsed(tools) if isinstance(tools, str) else tools
    if value in (None, "", []):
        return None
    if not isinstance(value, list):
        raise DataError("`tools` is not a list", fix="give a list of tool definitions")
    _check_depth(value, "`tools`")
    return value


def is_turns(value: object) -> bool:
    """Whether a column holds a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def says_nothing(turns: object) -> bool:
    """Whether turns have an assistant's among them, and none of these has text or a call."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return False
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    own = [
        turn
        for role, turn in zip(roles, turns, strict=True)
        if isinstance(role, str) and _SHAREGPT_ROLES.get(role, role) == "assistant"
    ]
    keys = ("content", "value", "tool_calls", *REASONING)
    return bool(own) and all(
        is_blank(turn.get(key)) or turn.get(key) == [] for turn in own for key in keys
    )


def _turn(number: int, turn: object) -> Message:
    turn = _with_role(number, turn)
    role = turn["role"]
    _check_keys(number, turn)
    _check_reasoning(number, turn)
    held = {key: turn.get(key) for key in _PASSED_ON}
    fields = {key: value for key, value in held.items() if not is_blank(value) and value != []}
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(number, fields["tool_calls"])
        _check_depth(fields["tool_calls"], f"`tool_calls` of turn {number}")
    for key in NAMES:
        if key in fields:
            fields[key] = as_text(fields[key], f"{key} of turn {number}")
    content = _content(number, turn.get("content"))
    if is_blank(content) and "tool_calls" not in fields and role in ("user", "assistant"):
        raise DataError(f"turn {number} ({role}) is empty", fix="give it text or remove it")
    masked_by = WEIGHT if turn.get("weight") is not None else TRAIN
    return Message(role, content, fields, _is_supervised(number, turn), masked_by)


def _with_role(number: int, turn: object) -> Mapping[str, Any]:
    """The turn under ``role`` and ``content``, its role one of ours."""
    if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
        return _from_sharegpt(number, turn)
    if not isinstance(turn, dict) or "role" not in turn:
        lacks = ""
        if isinstance(turn, dict):
            lacking = "value" if "from" in turn else "from" if "value" in turn else "role"
            lacks = f", lacks `{lacking}`"
        cause = f"turn {number} needs `role` and `content`{lacks}: is {shown(turn)}"
        raise DataError(cause, fix="ShareGPT has `from` and `value`")
    _check_role(number, turn["role"], ROLES)
    return turn


def _from_sharegpt(number: int, turn: Mapping[str, Any]) -> Mapping[str, Any]:
    if {"role", "content"} & turn.keys():
        cause = f"turn {number} has `from` and `value`, and `role` or `content` as well"
        raise DataError(cause, fix="keep one of the two ways to write a turn")
    said, value = turn["from"], turn["value"]
    _check_role(number, said, (*_SHAREGPT_ROLES, *ROLES))
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if said != _CALLS:
        return {**rest, "role": _SHAREGPT_ROLES.get(said, said), "content": value}
    if "tool_calls" in rest:
        cause = f"turn {number} ({_CALLS}) has `tool_calls` as well"
        raise DataError(cause, fix="keep one of them")
    calls = _parsed(value) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        cause = f"turn {number} ({_CALLS}) is {shown(value)}, not a call"
        raise DataError(cause, fix='write {"name": ..., "arguments": {...}}')
    wrapped = [{"type": "function", "function": call} for call in calls]
    return {**rest, "role": "assistant", "content": "", "tool_calls": wrapped}


def _check_role(number: int, role: object, roles: Sequence[str]) -> None:
    if not isinstance(role, str) or role not in roles:
        fix = f"{did_you_mean(str(role), roles)} use {', '.join(roles)}".strip()
        raise DataError(f"turn {number} has the unknown role {shown(role)}", fix=fix)


def _check_keys(number: int, turn: Mapping[str, Any]) -> None:
    used = {"role", "content", *_CHOICE, *_PASSED_ON}
    unknown = [key for key, value in turn.items() if key not in used and not is_blank(value)]
    if unknown:
        fix = (
            f"{did_you_mean(unknown[0], used)} remove it, or use {', '.join(sorted(used))}".strip()
        )
        raise DataError(f"turn {number} has the unknown key {shown(unknown[0])}", fix=fix)


def _check_reasoning(number: int, turn: Mapping[str, Any]) -> None:
    """Reasoning is text, the assistant's, and said once."""
    keys = [key for key in REASONING if turn.get(key) not in (None, "")]
    if keys and turn["role"] != "assistant":
        cause = f"turn {number} ({turn['role']}) has `{keys[0]}`"
        raise DataError(cause, fix="only assistant turns have reasoning: remove it")
    for key in keys:
        if not isinstance(turn[key], str):
            cause = f"`{key}` of turn {number} is {shown(turn[key])}, not text"
            raise DataError(cause, fix="write it as text")
    if len({turn[key] for key in keys}) > 1:
        cause = f"turn {number} has different reasoning in {listed(keys)}"
        raise DataError(cause, fix="keep one of them")


def _is_supervised(number: int, turn: Mapping[str, Any]) -> bool:
    """``weight: 0`` and ``train: false`` keep an assistant turn out of the loss."""
    choices = {key: turn[key] for key in _CHOICE if turn.get(key) is not None}
    for key, value in choices.items():
        if value not in (0, 1):
            fix = "use 0 or 1" if key == "weight" else "use true or false"
            raise DataError(f"`{key}` of turn {number} is {shown(value)}", fix=fix)
    if choices.get("train") and turn["role"] != "assistant":
        cause = f"turn {number} ({turn['role']}) has `train: true`"
        raise DataError(cause, fix="only assistant turns can be supervised: remove it")
    if turn["role"] == "assistant" and len(set(map(bool, choices.values()))) > 1:
        cause = f"`weight` and `train` of turn {number} disagree"
        raise DataError(cause, fix="keep one of them")
    return all(choices.values())


def _content(number: int, content: object) -> str:
    """Text, or a list of text parts joined."""
    if isinstance(content, list):
        bare = [part for part in content if not isinstance(part, dict)]
        if bare:
            cause = f"content of turn {number} is a list with {shown(bare[0])} in it, not text"
            raise DataError(cause, fix="write one text, or {type: text, text: ...} parts")
        if any(part.get("type", "text") != "text" or "text" not in part for part in content):
            raise DataError(
                f"content of turn {number} has a part that is not text",
                fix="only {type: text, text: ...} parts can be used: remove the others",
            )
        return "".join(as_text(part["text"], f"content of turn {number}") for part in content)
    return as_text(content, f"content of turn {number}")


def _tool_calls(number: int, calls: object) -> list[Any]:
    """Calls with their arguments as objects, as templates expect them."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"`tool_calls` of turn {number} is not a list of calls")
    return [_tool_call(number, call) for call in calls]


def _tool_call(number: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a call of turn {number} names no function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    function = {**function, "arguments": {} if arguments is None else arguments}
    return {**call, "function": function} if "function" in call else function


def _check_depth(value: object, what: str) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise DataError(f"{what} is nested deeper than {_DEEPEST} levels", fix="flatten it")


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _parsed(text: str) -> Any:
    return parse_json(text) if text.strip() else None
