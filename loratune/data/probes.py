"""What a chat template does with a conversation, seen by rendering one: nothing goes by names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratune.data.reasoning import opens_reasoning
from loratune.errors import DataError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""Renders turns; the flag asks for the header of the assistant's next turn."""
_QUESTION: Mapping[str, Any] = {"role": "user", "content": "quartz"}
_ARGUMENTS = {"quartz": "basalt"}


def header_opens_reasoning(render: Render) -> bool:
    """Whether the header of the assistant's next turn ends with the tag that opens reasoning."""
    try:
        return opens_reasoning(render([_QUESTION], True))
    except DataError:
        return False


def wants_written_arguments(render: Render) -> bool:
    """Whether arguments of calls must be JSON text: objects fail, or are written as Python does."""

    def rendered(arguments: object) -> str:
        function = {"name": "granite", "arguments": arguments}
        call = {"id": "abcdefghi", "type": "function", "function": function}  # Mistral's length
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return render([_QUESTION, answer], False)
        except DataError:
            return ""

    of_objects, text = rendered(_ARGUMENTS), json.dumps(_ARGUMENTS)
    of_text = rendered(text)
    as_is = text in of_text and repr(text) not in of_text
    return as_is and (not of_objects or repr(_ARGUMENTS) in of_objects)
