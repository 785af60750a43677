"""Numbers in calls and tools: the template writes the digits of the file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratune.data.chat import ChatRenderer
from loratune.data.conversations import read_tools, read_turns
from loratune.data.json_rows import parse_json
from loratune.data.numbers import json_text
from loratune.errors import DataError

from .chat_templates import tokenizer_for

CALLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} ARGUMENTS{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LITERALS = [
    "4.50", "1e3", "-0", "0.00", "3.14159265358979323846", "1e400", "-1E-400", "9" * 5000,
    "12345678901234567890", "4.5", "7", "-1.25e-05",
]  # fmt: skip
WAYS = {
    "as JSON": "{{ call.function.arguments | tojson }}",
    "as text": "{{ '' + call.function.arguments }}",
    "one by one": "{% for k, v in call.function.arguments.items() %}{{ k }}={{ v }}\n{% endfor %}",
    "indented": "{{ call.function.arguments | tojson(indent=2) }}",
    "marked": "{% generation %}{{ call.function.arguments | tojson }}{% endgeneration %}",
}


def rendered(arguments: str, way: str, tools: str = "[]") -> str:
    template = CALLS.replace("ARGUMENTS", way)
    call = f'[{{"function": {{"name": "pay", "arguments": {arguments}}}}}]'
    turns = [
        {"role": "user", "content": "Pay."},
        {"role": "assistant", "content": "So: ", "tool_calls": parse_json(call)},
    ]
    renderer = ChatRenderer(tokenizer_for(template), template)
    row = renderer.row(read_turns(turns, "messages"), "t:1", read_tools(parse_json(tools)))
    learnt = "".join(segment.text for segment in row.segments if segment.supervised)
    if "generation" in way:
        assert learnt.startswith("{") and learnt.endswith("}")
    else:
        assert learnt.startswith("So: pay ") and learnt.endswith("<|im_end|>")
    return "".join(segment.text for segment in row.segments)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("quoted", [False, True])
def test_every_way_of_writing_arguments_keeps_their_digits(way: str, quoted: bool) -> None:
    pairs = ", ".join(f'"n{place}": {literal}' for place, literal in enumerate(LITERALS))
    arguments = f'{{{pairs}, "list": [4.50, 4.5, {{"again": 4.50}}]}}'
    text = rendered(json.dumps(arguments) if quoted else arguments, WAYS[way])
    for place, literal in enumerate(LITERALS):
        pair = f"n{place}={literal}\n" if way == "one by one" else f'"n{place}": {literal},'
        assert pair in text
    if way in ("as JSON", "as text", "marked"):
        assert text.removesuffix("<|im_end|>").endswith(f"So: pay {arguments}")


def test_definitions_of_tools_keep_their_digits() -> None:
    tools = '[{"name": "pay", "parameters": {"most": 4.50, "least": 1e-3, "many": 1e400}}]'
    assert rendered("{}", WAYS["as JSON"], tools).startswith(tools)


def test_rows_that_differ_in_the_digits_alone_are_not_taken_for_each_other() -> None:
    template = CALLS.replace("ARGUMENTS", WAYS["as JSON"])
    renderer = ChatRenderer(tokenizer_for(template), template)
    for literal in ("4.5", "4.50", "4.500"):
        arguments = parse_json(f'{{"a": {literal}}}')
        call = {"function": {"name": "pay", "arguments": arguments}}
        turns = [
            {"role": "user", "content": "Pay."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        row = renderer.row(read_turns(turns, "messages"), "t:1")
        assert row.segments[-1].text == f'pay {{"a": {literal}}}<|im_end|>'


def test_a_template_that_reckons_with_a_number_reckons_as_transformers_does() -> None:
    way = "{{ call.function.arguments.a * 2 }} {{ call.function.arguments.b }}"
    assert rendered('{"a": 4.50, "b": 1.50}', way).endswith("9.0 1.5<|im_end|>")
    with pytest.raises(DataError, match=r"reckons with 1e400, which is too large; t:1"):
        rendered('{"a": 1e400, "b": 1.50}', way)


@pytest.mark.parametrize("value", ['{"a": [1.50, "x", null, true]}', "[]", "1.50", '"1.50"'])
def test_json_text_is_what_was_read(value: str) -> None:
    assert json_text(parse_json(value)) == value


def test_ordinary_numbers_are_written_as_transformers_writes_them() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = CALLS.replace("ARGUMENTS", WAYS["as JSON"])
    arguments: dict[str, Any] = {"a": 4.5, "b": [1, -2.25e-05, 10**22], "c": True, "d": None}
    call = {"function": {"name": "pay", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Pay."},
        {"role": "assistant", "content": "So: ", "tool_calls": [call]},
    ]
    theirs = render_jinja_template(conversations=[turns], chat_template=template)[0][0]
    assert rendered(json.dumps(arguments), WAYS["as JSON"]) == theirs.rstrip("\n")
