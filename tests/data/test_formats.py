from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, RowFormat
from loratune.data.columns import column_notes
from loratune.data.formats import choose_format, parse_question, parse_rows, question_row
from loratune.data.rows import Example, Row
from loratune.data.templates import PromptFormat, placeholders, substitute
from loratune.errors import ConfigError, DataError, LoratuneError

USER, ASSISTANT = (
    {"role": "user", "content": "Name a tree."},
    {"role": "assistant", "content": "Alder."},
)


def rows_of(*columns: dict[str, Any]) -> list[Row]:
    return [Row(row, f"train.jsonl:{n}") for n, row in enumerate(columns, start=1)]


def parsed(*columns: dict[str, Any], **config: Any) -> tuple[list[Example], int]:
    rows = rows_of(*columns)
    examples, left_out = parse_rows(rows, choose_format(DataConfig(**config), rows))
    return examples, len(left_out)


def left_out(*columns: dict[str, Any], **config: Any) -> list[tuple[str, str]]:
    rows = rows_of(*columns)
    _, rows_left_out = parse_rows(rows, choose_format(DataConfig(**config), rows))
    return [(row.source, row.why) for row in rows_left_out]


def error_of(*columns: dict[str, Any], **config: Any) -> LoratuneError:
    with pytest.raises(LoratuneError) as caught:
        parsed(*columns, **config)
    return caught.value


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": "a"}, RowFormat.text),
        ({"prompt": "a", "completion": "b", "text": "c"}, RowFormat.prompt),
        ({"instruction": "a", "output": "b"}, RowFormat.instruction),
        ({"instruction": "a", "input": "c", "output": "b"}, RowFormat.instruction),
        ({"messages": [{"role": "assistant", "content": "b"}]}, RowFormat.messages),
    ],
)
def test_the_format_follows_from_the_columns(columns: dict[str, Any], expected: RowFormat) -> None:
    assert choose_format(DataConfig(), rows_of(columns)).format is expected


def test_a_wrong_column_is_named_with_those_found_and_a_guess() -> None:
    error = error_of({"promt": "a", "completion": "b"})
    assert isinstance(error, DataError)
    assert "missing `prompt`, found 'promt', 'completion'" in str(error)
    assert "did you mean 'promt'" in str(error)


def test_columns_that_look_like_nothing_list_every_format() -> None:
    text = str(error_of({"x": "a", "y": "b"}))
    assert "prompt+completion" in text and "found 'x', 'y'" in text


def test_a_row_that_lacks_a_column_later_is_named() -> None:
    error = error_of({"prompt": "a", "completion": "b"}, {"prompt": "a", "compl": "b"})
    assert "missing `completion`" in str(error) and "train.jsonl:2" in str(error)


def test_many_bad_rows_give_few_lines_and_the_count_of_the_rest() -> None:
    bad = [{"prompt": "a", "completion": ["b"]}] * 20
    error = error_of({"prompt": "a", "completion": "b"}, *bad)
    assert len(error.lines()) == 6
    assert "15 more rows" in error.lines()[-1]


def test_columns_map_our_names_to_theirs() -> None:
    columns = {"prompt": "question", "completion": "reply"}
    found, _ = parsed({"question": "q", "reply": " r", "id": 4}, columns=columns)
    assert (found[0].prompt, found[0].answer) == ("q", " r")


def test_a_mapping_to_a_missing_column_is_helped() -> None:
    error = error_of({"question": "q", "reply": "r"}, columns={"prompt": "qestion"})
    assert "data.columns.prompt" in str(error) and "did you mean 'question'" in str(error)


def test_blank_rows_are_dropped_and_counted() -> None:
    blank = [
        {"prompt": "a", "completion": None},
        {"prompt": "a", "completion": " \n"},
        {"prompt": "", "completion": "b"},
        {"prompt": None, "completion": None},
        {},
    ]
    found, empty = parsed({"prompt": "a", "completion": "b"}, *blank)
    assert (len(found), empty) == (1, 5)


def test_numbers_are_written_out_and_other_types_refused() -> None:
    found, _ = parsed({"prompt": 3, "completion": 0.5})
    assert (found[0].prompt, found[0].answer) == ("3", "0.5")
    for value in (True, ["a"], {"a": 1}):
        assert "not text" in str(error_of({"prompt": "a", "completion": value}))


def test_half_a_surrogate_pair_is_refused_before_any_tokenizer_sees_it() -> None:
    assert "surrogate" in str(error_of({"prompt": "a", "completion": "b\ud800"}))


def test_control_characters_in_column_names_do_not_reach_the_message() -> None:
    text = str(error_of({"\x1b[31mred\x07": "a", "[/foo]": "b"}))
    assert "\x1b" not in text and "\x07" not in text


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "usr", "content": "a"}], "unknown role 'usr'"),
        ([USER, {"role": "assistant", "content": " "}, USER, ASSISTANT], "is empty"),
        ([USER, ASSISTANT, USER, {"role": "assistant", "content": ""}], "is empty"),
        ([USER, {**ASSISTANT, "weight": 0}], "all are masked (weight: 0)"),
        ([USER, {**ASSISTANT, "train": False}], "all are masked (train: false)"),
        ([{"content": "a"}], "lacks `role`"),
        ([{"from": "human"}], "lacks `value`"),
        ([{"value": "a"}], "lacks `from`"),
        ([{"from": "robot", "value": "a"}], "use human, gpt,"),
        ([{"from": "human", "value": ["a", "b"]}], "a list with 'a' in it, not text"),
        ([{"role": "user", "content": ["a"]}], "a list with 'a' in it, not text"),
        ([{"from": "function_call", "value": "look it up"}], "is not JSON"),
        ([{"from": "function_call", "value": "7"}], "'7', not a call"),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ([{"from": "user", "valeu": "a"}], "needs `role` and `content`"),
        ([7], "needs `role` and `content`"),
        ("hello", "not a list"),
    ],
)
def test_improper_conversations_are_refused_with_line_and_reason(turns: Any, reason: str) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    error = error_of({"messages": good}, {"messages": turns})
    assert isinstance(error, DataError)
    assert reason in str(error) and "train.jsonl:2" in str(error)


def test_a_conversation_without_turns_is_a_blank_row() -> None:
    good = [{"role": "assistant", "content": "b"}]
    found, empty = parsed({"messages": good}, {"messages": []}, {"messages": None})
    assert (len(found), empty) == (1, 2)


def test_a_template_writes_the_prompt_from_any_columns() -> None:
    row = {"city": "Oslo", "completion": "Norway", "count": 2}
    found, _ = parsed(row, template="{{{count}}} Where is {city}?")
    assert found[0].prompt == "{2} Where is Oslo?"


def test_a_template_needs_an_answer_column() -> None:
    assert "missing `completion`" in str(error_of({"city": "Oslo"}, template="{city}"))


def test_a_template_with_an_unknown_placeholder_is_a_configuration_error() -> None:
    error = error_of({"city": "Oslo", "completion": "Norway"}, template="{cty}")
    assert isinstance(error, ConfigError)
    assert "did you mean 'city'" in str(error)


@pytest.mark.parametrize("format_", ["text", "messages"])
def test_a_template_that_would_be_ignored_is_refused(format_: str) -> None:
    config = {"template": "{a}", "format": RowFormat(format_)}
    assert isinstance(error_of({"a": "b", "text": "c"}, **config), ConfigError)


@pytest.mark.parametrize(
    "template",
    ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>1000000000}", "{}", "{0}", "{a", "a}", "{a:{b}}"],
)
def test_templates_hold_names_and_nothing_that_computes(template: str) -> None:
    with pytest.raises(ConfigError):
        substitute(template, {"a": "x", "b": "y"})


def test_braces_in_values_have_no_meaning() -> None:
    text, values = substitute("{a}|{b}", {"a": "{b}", "b": "{{c}}"})
    assert text == "{b}|{{c}}"
    assert [text[start:end] for start, end in values] == ["{b}", "{{c}}"]
    assert placeholders("{a} {{b}} {c} {a}") == ["a", "c"]


def test_instruction_rows_show_an_input_only_where_there_is_one() -> None:
    bare = {"instruction": "Add.", "input": "", "output": "3"}
    found, empty = parsed(bare, {**bare, "input": "1 and 2"})
    assert empty == 0
    assert "Input" not in found[0].prompt and "Add." in found[0].prompt
    assert "1 and 2" in found[1].prompt


@pytest.mark.parametrize(
    "config",
    [
        {"template": "Q: {q}\nA:", "columns": {"completion": "a"}},
        {"columns": {"instruction": "q", "output": "a"}},
        {"columns": {"prompt": "q", "completion": "a"}},
    ],
)
def test_a_format_read_back_writes_the_same_prompt(config: dict[str, Any]) -> None:
    import json

    row = {"q": "why?", "a": "because"}
    chosen = choose_format(DataConfig(**config), rows_of(row))
    again = PromptFormat.from_dict(json.loads(json.dumps(chosen.to_dict())))
    assert again == chosen
    assert again.prompt({"q": "how?"})[0] == chosen.prompt(row)[0].replace("why?", "how?")


def test_a_damaged_format_is_a_configuration_error() -> None:
    for values in ({"format": "nonsense"}, {}, {"format": "text", "surplus": 1}):
        with pytest.raises(ConfigError):
            PromptFormat.from_dict(values)


HUMAN, GPT = {"from": "human", "value": "Name a tree."}, {"from": "gpt", "value": "Alder."}


@pytest.mark.parametrize(
    ("row", "config"),
    [
        ({"conversations": [HUMAN, GPT]}, {}),
        ({"dialog": [HUMAN, GPT]}, {"columns": {"conversations": "dialog"}}),
        ({"dialog": [HUMAN, GPT]}, {"columns": {"messages": "dialog"}}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {}),
        ({"q": [USER], "a": [ASSISTANT]}, {"columns": {"prompt": "q", "completion": "a"}}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"format": RowFormat.messages}),
        ({"messages": [USER, ASSISTANT]}, {}),
    ],
)
def test_every_way_to_write_a_conversation_is_a_conversation(
    row: dict[str, Any], config: dict[str, Any]
) -> None:
    assert choose_format(DataConfig(**config), rows_of(row)).format is RowFormat.messages
    (found,), _ = parsed(row, **config)
    assert [(turn.role, turn.content) for turn in found.messages] == [
        ("user", "Name a tree."),
        ("assistant", "Alder."),
    ]


def test_only_the_completion_of_message_lists_is_supervised() -> None:
    (found,), _ = parsed({"prompt": [ASSISTANT, USER], "completion": [ASSISTANT]})
    assert [turn.supervised for turn in found.messages] == [False, False, True]


def test_a_null_completion_beside_message_lists_is_a_blank_row() -> None:
    good = {"prompt": [USER], "completion": [ASSISTANT]}
    found, empty = parsed(good, {"prompt": [USER], "completion": None})
    assert (len(found), empty) == (1, 1)


@pytest.mark.parametrize("name", ["system", "rules"])
def test_a_system_column_is_the_first_turn_of_a_conversation(name: str) -> None:
    columns = {} if name == "system" else {"system": name}
    row = {name: "Be brief.", "conversations": [HUMAN, GPT], "tools": '[{"name": "f"}]'}
    (found,), _ = parsed(row, columns=columns)
    assert (found.messages[0].role, found.messages[0].content) == ("system", "Be brief.")
    assert found.tools == [{"name": "f"}]
    twice = {"system": "Be brief.", "messages": [{"role": "system", "content": "x"}, ASSISTANT]}
    assert "beside a system turn" in str(error_of(twice))


@pytest.mark.parametrize("written_as_json", [False, True])
def test_instruction_rows_show_system_and_history_before_the_question(
    written_as_json: bool,
) -> None:
    history: Any = [["Hi", "Hello."], ["Again?", "Yes."]]
    row = {
        "system": "Rhyme.",
        "history": str(history).replace("'", '"') if written_as_json else history,
        "instruction": "Name a tree.",
        "input": "of the north",
        "output": "Fir.",
    }
    (found,), _ = parsed(row)
    assert found.prompt == (
        "### System\nRhyme.\n\n"
        "### Instruction\nHi\n\n### Answer\nHello.\n\n"
        "### Instruction\nAgain?\n\n### Answer\nYes.\n\n"
        "### Instruction\nName a tree.\n\n### Input\nof the north\n\n### Answer\n"
    )
    assert found.answer == "Fir."
    assert [found.prompt[start:end] for start, end in found.prompt_values] == [
        "Rhyme.", "Hi", "Hello.", "Again?", "Yes.", "Name a tree.", "of the north",
    ]  # fmt: skip


def test_columns_map_system_and_history_too() -> None:
    columns = {"system": "rules", "history": "past"}
    row = {"rules": "Rhyme.", "past": [["a", "b"]], "instruction": "c", "output": "d"}
    (found,), _ = parsed(row, columns=columns)
    assert found.prompt.startswith("### System\nRhyme.\n\n### Instruction\na\n")


def test_an_older_adapters_format_writes_what_it_wrote() -> None:
    kept = PromptFormat.from_dict(
        {
            "format": "instruction",
            "template": "### Instruction\n{instruction}\n\n### Answer\n",
            "input_template": "{instruction} {input}",
            "answer": "output",
        }
    )
    text, _ = kept.prompt({"instruction": "a", "output": "b"})
    assert text == "### Instruction\na\n\n### Answer\n"


@pytest.mark.parametrize("history", [[["only a question"]], "hello", [{"role": "user"}], [3]])
def test_a_history_that_is_not_made_of_pairs_is_refused(history: Any) -> None:
    error = error_of({"history": history, "instruction": "a", "output": "b"})
    assert "exchange 1 of `history`" in str(error) and "train.jsonl:1" in str(error)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"system": "Rhyme.", "prompt": "a", "completion": "b"}, "system"),
        ({"history": [["a", "b"]], "prompt": "a", "completion": "b"}, "history"),
        ({"tools": [{"name": "f"}], "prompt": "a", "completion": "b"}, "tools"),
        ({"tools": [{"name": "f"}], "instruction": "a", "output": "b"}, "tools"),
        ({"system": "Rhyme.", "text": "a"}, "system"),
        ({"history": [["a", "b"]], "messages": [USER, ASSISTANT]}, "history"),
    ],
)
def test_a_column_that_changes_the_meaning_and_cannot_be_used_is_refused(
    row: dict[str, Any], name: str
) -> None:
    error = error_of(row)
    assert isinstance(error, DataError)
    assert f"`{name}` changes what is asked" in str(error) and "train.jsonl:1" in str(error)
    assert f"data.columns.{name}=" in error.fix
    found, _ = parsed(row, columns={name: ""})
    assert len(found) == 1
    assert len(parsed({**row, name: None})[0]) == 1


def test_a_template_of_ones_own_may_use_or_leave_out_the_system_text() -> None:
    row = {"system": "Rhyme.", "prompt": "a", "completion": "b"}
    assert parsed(row, template="{system}: {prompt}")[0][0].prompt == "Rhyme.: a"
    assert parsed(row, template="{prompt}!")[0][0].prompt == "a!"


def test_a_mapping_of_a_name_that_nothing_reads_is_refused() -> None:
    error = error_of({"q": "a", "prompt": "b", "completion": "c"}, columns={"promt": "q"})
    assert isinstance(error, ConfigError)
    assert "data.columns.promt" in str(error) and "did you mean 'prompt'" in str(error)


def test_nan_and_infinity_are_not_text() -> None:
    for value, word in ((float("nan"), "NaN"), (float("-inf"), "infinity")):
        assert f"`completion` is {word}" in str(error_of({"prompt": "a", "completion": value}))


def test_half_a_surrogate_pair_in_a_call_is_refused_with_its_row() -> None:
    call = {"name": "f", "arguments": {"a": "b\ud800"}}
    turns = [USER, {"role": "assistant", "content": "x", "tool_calls": [call]}]
    error = error_of({"messages": turns})
    assert "surrogate" in str(error) and "train.jsonl:1" in str(error)


def notes_of(*columns: dict[str, Any], recognised: bool = True, **config: Any) -> tuple[str, ...]:
    rows = rows_of(*columns)
    return column_notes(rows, choose_format(DataConfig(**config), rows), recognised=recognised)


def test_unused_columns_are_named_with_their_rows() -> None:
    row = {"id": 4, "prompt": "a", "completion": "b"}
    assert notes_of(row, {**row, "score": 0.5}) == ("columns not used: id, score (1 row)",)
    assert notes_of({"prompt": "a", "completion": "b"}) == ()
    assert notes_of({"city": "a", "id": 1, "completion": "b"}, template="{city}") == (
        "columns not used: id",
    )
    shadowed = {"prompt": "a", "question": "b", "completion": "c"}
    assert notes_of(shadowed, columns={"prompt": "question"}) == ("columns not used: prompt",)


def test_the_choice_between_several_formats_is_said() -> None:
    row = {"messages": [USER, ASSISTANT], "prompt": "a", "completion": "b", "text": "c"}
    assert notes_of(row) == (
        "the rows hold several formats (messages, prompt+completion, text): "
        "data.format=messages is used",
        "columns not used: prompt, completion, text",
    )
    assert notes_of(row, recognised=False, format=RowFormat.text) == (
        "columns not used: messages, prompt, completion",
    )


def test_numbers_taken_as_text_are_counted() -> None:
    rows = [{"prompt": 5, "completion": 1.5}, {"prompt": "a", "completion": 2}]
    assert notes_of(*rows) == ("numbers taken as text: prompt (1 row), completion (2 rows)",)
    turns = [USER, {"role": "assistant", "content": 4}]
    assert notes_of({"messages": turns}) == ("numbers taken as text: messages (1 row)",)


def question(row: dict[str, Any], prompt: str, system: str) -> Example:
    chosen = choose_format(DataConfig(), rows_of(row))
    return parse_question(question_row(prompt, system, chosen), chosen)


def test_a_system_text_is_asked_where_the_format_has_a_place_for_it() -> None:
    asked = question({"instruction": "a", "output": "b"}, "c", "Rhyme.")
    assert asked.prompt == "### System\nRhyme.\n\n### Instruction\nc\n\n### Answer\n"
    turns = question({"conversations": [HUMAN, GPT]}, "c", "Rhyme.").messages
    assert [turn.role for turn in turns] == ["system", "user"]
    for row in ({"prompt": "a", "completion": "b"}, {"text": "a"}):
        with pytest.raises(ConfigError, match="no place for a system text"):
            question(row, "c", "Rhyme.")


EMPTY_ANSWERS = {
    "`completion` is empty": {"prompt": "a", "completion": " "},
    "`prompt` is empty": {"prompt": "", "completion": "b"},
    "`output` is empty": {"instruction": "a", "input": "", "output": None},
    "every assistant turn of `messages` is empty": {
        "messages": [USER, {"role": "assistant", "content": " "}]
    },
    "every assistant turn of `conversations` is empty": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]
    },
    "`messages` is empty": {"messages": []},
    "the row is blank": {"text": None},
}


@pytest.mark.parametrize("why", EMPTY_ANSWERS)
def test_a_row_that_answers_nothing_is_left_out_by_name_in_every_format(why: str) -> None:
    assert left_out(EMPTY_ANSWERS[why], format=_format_of(EMPTY_ANSWERS[why])) == [
        ("train.jsonl:1", why)
    ]


def _format_of(row: dict[str, Any]) -> RowFormat:
    names = {"prompt": RowFormat.prompt, "instruction": RowFormat.instruction}
    return next((names[name] for name in names if name in row), RowFormat.auto)


def test_the_users_own_name_of_an_empty_column_is_said() -> None:
    row = {"question": "q", "reply": ""}
    columns = {"prompt": "question", "completion": "reply"}
    assert left_out(row, columns=columns) == [("train.jsonl:1", "`reply` is empty")]


def test_an_answer_with_a_call_or_reasoning_alone_is_not_empty() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    (found,), empty = parsed({"messages": [USER, call]})
    assert empty == 0 and found.messages[1].fields["tool_calls"]


def test_parts_that_are_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    (found,), _ = parsed({"messages": [{"role": "user", "content": parts}, ASSISTANT]})
    assert found.messages[0].content == "a b"


def test_sharegpts_function_call_is_a_turn_that_calls() -> None:
    called = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1.50}}'}
    (found,), _ = parsed({"conversations": [{"from": "human", "value": "q"}, called]})
    [call] = found.messages[1].fields["tool_calls"]
    assert found.messages[1].role == "assistant" and call["function"]["name"] == "f"
    assert str(call["function"]["arguments"]["x"]) == "1.50"


def test_a_completion_that_is_text_beside_message_lists_is_told_its_form() -> None:
    error = error_of({"prompt": [USER], "completion": "a"})
    assert 'write [{"role": "assistant", "content": ...}, ...]' in error.fix


def test_a_history_that_is_not_json_is_named() -> None:
    row = {"instruction": "i", "output": "o", "history": "[['a', 'b']]"}
    assert str(error_of(row)).startswith("error[3] `history`: ")
    assert "train.jsonl:1" in str(error_of(row))
