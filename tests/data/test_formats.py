from __future__ import annotations

from typing import Any

import pytest

from loratune.config.schema import DataConfig, RowFormat
from loratune.data.formats import choose_format, parse_rows
from loratune.data.rows import Example, Row
from loratune.data.templates import PromptFormat, placeholders, substitute
from loratune.errors import ConfigError, DataError, LoratuneError


def rows_of(*columns: dict[str, Any]) -> list[Row]:
    return [Row(row, f"train.jsonl:{n}") for n, row in enumerate(columns, start=1)]


def parsed(*columns: dict[str, Any], **config: Any) -> tuple[list[Example], int]:
    rows = rows_of(*columns)
    return parse_rows(rows, choose_format(DataConfig(**config), rows))


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
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "is empty"),
        ([{"role": "user", "content": "a"}], "no assistant turn"),
        ([{"from": "user", "text": "a"}], "needs `role` and `content`"),
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
    written, _ = chosen.prompt(row)
    assert again.prompt({"q": "how!"})[0] == written.replace("why?", "how!")


def test_a_damaged_format_is_a_configuration_error() -> None:
    for values in ({"format": "nonsense"}, {}, {"format": "text", "surplus": 1}):
        with pytest.raises(ConfigError):
            PromptFormat.from_dict(values)
