"""Which columns make a row: recognised from their names, checked in every row.

text                              every token is supervised
prompt, completion                the completion is supervised
instruction, [input], output      the output is supervised; ``system`` and ``history`` go before
messages                          every assistant turn is supervised; also ``conversations``, and
                                  lists of messages in prompt and completion
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratune.config.schema import DataConfig, RowFormat
from loratune.data.columns import (
    OURS,
    REQUIRED,
    TURNS,
    check_meaning,
    formats_in,
    used_columns,
)
from loratune.data.conversations import is_turns, read_tools, read_turns, says_nothing
from loratune.data.not_supervised import IN_PROMPT
from loratune.data.rows import (
    ERRORS_SHOWN,
    Example,
    LeftOut,
    Message,
    Row,
    listed,
    raise_first,
)
from loratune.data.templates import (
    EXCHANGE_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    INSTRUCTION_WITH_INPUT_TEMPLATE,
    PLAIN_TEMPLATE,
    SYSTEM_TEMPLATE,
    PromptFormat,
    as_text,
    check_placeholder,
    is_blank,
    placeholders,
    read_history,
)
from loratune.errors import ConfigError, DataError, LoratuneError, did_you_mean

ANSWERS = {RowFormat.prompt: "completion", RowFormat.instruction: "output"}


def choose_format(config: DataConfig, rows: Iterable[Row]) -> PromptFormat:
    """The format of the rows, from ``data.format`` or the columns of the first row with a value.

    Raises:
        DataError: no format fits; names the missing column and those found.
        ConfigError: ``data.columns`` or ``data.template`` name what is not there.
    """
    rows = iter(rows)
    first = next(rows)
    if _is_empty(first):
        first = next((row for row in rows if not _is_empty(row)), first)
    named = PromptFormat(RowFormat.text, columns=config.columns).named(first.columns)
    _check_columns(config, first)
    answer = None
    if config.template is not None:
        answer = _answer_beside_template(config, named, first)
    chosen = config.format
    if chosen is RowFormat.auto:
        answered = RowFormat.instruction if answer == "output" else RowFormat.prompt
        chosen = answered if answer else _recognise(named, first)
    if answer is None:
        _check_required(chosen, named, first)
    return _format(chosen, config, answer)


def _format(chosen: RowFormat, config: DataConfig, answer: str | None) -> PromptFormat:
    columns = dict(config.columns)
    if answer is not None:
        return PromptFormat(chosen, config.template, answer=answer, columns=columns)
    if chosen is RowFormat.prompt:
        return PromptFormat(chosen, PLAIN_TEMPLATE, answer=ANSWERS[chosen], columns=columns)
    if chosen is RowFormat.instruction:
        templates = (INSTRUCTION_TEMPLATE, INSTRUCTION_WITH_INPUT_TEMPLATE)
        return PromptFormat(
            chosen,
            *templates,
            answer=ANSWERS[chosen],
            columns=columns,
            system_template=SYSTEM_TEMPLATE,
            exchange_template=EXCHANGE_TEMPLATE,
        )
    return PromptFormat(chosen, answer="text" if chosen is RowFormat.text else "", columns=columns)


def _answer_beside_template(config: DataConfig, named: Mapping[str, Any], row: Row) -> str:
    if config.format in (RowFormat.text, RowFormat.messages):
        cause = f"data.template has no meaning for data.format={config.format}"
        raise ConfigError(cause, where="data.template", fix="remove one of them")
    for name in placeholders(config.template or ""):
        check_placeholder(name, named)
    wanted = ANSWERS.get(config.format)
    answers = [wanted] if wanted else list(ANSWERS.values())
    for answer in answers:
        if answer in named:
            return answer
    raise _missing(answers[0], row)


def _check_columns(config: DataConfig, row: Row) -> None:
    read = {*OURS, *placeholders(config.template or "")}
    for our, theirs in config.columns.items():
        where = f"data.columns.{our}"
        if our not in read:
            fix = did_you_mean(our, read) or f"use one of {', '.join(sorted(read))}"
            raise ConfigError(f"rows have no part called '{our}'", where=where, fix=fix)
        if theirs and theirs not in row.columns:
            fix = did_you_mean(theirs, row.columns)
            cause = f"no column `{theirs}` in the rows, found {listed(row.columns)}"
            raise DataError(cause, where=f"{where}, {row.source}", fix=fix)


def _recognise(named: Mapping[str, Any], row: Row) -> RowFormat:
    if found := formats_in(named):
        return found[0]
    nearest = max(REQUIRED, key=lambda chosen: _likeness(REQUIRED[chosen], named))
    missing = next(column for column in REQUIRED[nearest] if column not in named)
    raise _missing(missing, row, known=_likeness(REQUIRED[nearest], named) > 0)


def _likeness(required: Collection[str], named: Collection[str]) -> float:
    """Share of a format's columns that are there, a misspelt one counting half."""
    present = sum(column in named for column in required)
    close = sum(bool(did_you_mean(column, named)) for column in required if column not in named)
    return (present + close / 2) / len(required)


def _check_required(chosen: RowFormat, named: Mapping[str, Any], row: Row) -> None:
    if chosen in formats_in(named):
        return
    for column in REQUIRED[chosen]:
        if column not in named:
            raise _missing(column, row)


def _missing(column: str, row: Row, *, known: bool = True) -> DataError:
    found = listed(row.columns)
    close = did_you_mean(column, row.columns).removeprefix("did you mean '").removesuffix("'?")
    name = close or "YOURS"
    fix = f"rename the column or set data.columns.{column}={name}"
    if close:
        fix = f"did you mean '{close}'? {fix}"
    if known:
        return DataError(f"missing `{column}`, found {found}", where=row.source, fix=fix)
    formats = " | ".join("+".join(columns) for columns in REQUIRED.values())
    fix = f"name the columns {formats}, or map them with data.columns, or set data.template"
    return DataError(f"no known columns, found {found}", where=row.source, fix=fix)


def parse_rows(
    rows: Sequence[Row], prompt_format: PromptFormat
) -> tuple[list[Example], list[LeftOut]]:
    """Every row checked and its prompt written out; rows without a prompt or an answer left out.

    Returns:
        The examples in order, and the rows left out.

    Raises:
        DataError: the rows that lack a column, hold no text, or are not a conversation.
    """
    examples: list[Example] = []
    problems: list[LoratuneError] = []
    left_out: list[LeftOut] = []
    for row in rows:
        try:
            example = parse_row(row, prompt_format)
        except LoratuneError as problem:
            if not problem.where.startswith(row.source):
                problem.where = ", ".join(filter(None, (row.source, problem.where)))
            problems.append(problem)
            continue
        if isinstance(example, LeftOut):
            left_out.append(example)
        else:
            examples.append(example)
    raise_first(problems[:ERRORS_SHOWN], total=len(problems))
    return examples, left_out


def parse_row(row: Row, prompt_format: PromptFormat) -> Example | LeftOut:
    """One row as an example, or what of it is empty.

    Raises:
        DataError: as for ``parse_rows``.
    """
    if _is_empty(row):
        return LeftOut(row.source, "the row is blank")
    named = prompt_format.named(row.columns)
    check_meaning(row, prompt_format, named)
    if prompt_format.format is RowFormat.messages:
        return _conversation(row, named)
    if prompt_format.answer not in named:
        raise _missing(prompt_format.answer, row)
    if is_blank(named[prompt_format.answer]):
        return _left_out(row, prompt_format, [prompt_format.answer])
    answer = as_text(named[prompt_format.answer], prompt_format.answer)
    if prompt_format.format is RowFormat.text:
        return Example(row.source, answer=answer)
    names = placeholders(prompt_format.template or "")
    for name in names:
        if name not in named:
            raise _missing(name, row)
    if names and all(is_blank(named[name]) for name in names):
        return _left_out(row, prompt_format, names)
    return _asked(row, prompt_format, answer)


def _left_out(row: Row, prompt_format: PromptFormat, ours: Sequence[str]) -> LeftOut:
    """The row without what these columns should hold, which the user may call otherwise."""
    names = " and ".join(f"`{prompt_format.columns.get(name, name)}`" for name in ours)
    return LeftOut(row.source, f"{names} {'is' if len(ours) == 1 else 'are'} empty")


def parse_question(row: Row, prompt_format: PromptFormat) -> Example:
    """One row to be answered: read and checked as for training, its own answer left out.

    Raises:
        DataError: if it asks nothing, or is not a row of this format.
    """
    named = prompt_format.named(row.columns)
    check_meaning(row, prompt_format, named)
    if prompt_format.format is RowFormat.messages:
        conversation = _conversation(row, named, answered=False)
        example = conversation if isinstance(conversation, Example) else Example(row.source)
    elif prompt_format.format is RowFormat.text:
        column = "prompt" if "prompt" in named else "text"
        example = Example(row.source, as_text(named.get(column), column))
    else:
        for name in placeholders(prompt_format.template or ""):
            if name not in named:
                raise _missing(name, row)
        example = _asked(row, prompt_format, "")
    if not (example.messages or example.prompt.strip()):
        raise DataError("the row asks nothing", where=row.source, fix="give it a prompt")
    return example


def question_row(prompt: str, system: str | None, prompt_format: PromptFormat | None) -> Row:
    """A row that asks ``prompt`` under a format that may name its columns otherwise.

    Raises:
        ConfigError: if the format needs several texts, or has no place for a system text.
    """
    source = "prompt"
    if system is not None and not _has_system(prompt_format):
        cause = "the adapter's format has no place for a system text"
        raise ConfigError(cause, where="system", fix="write it into prompt, or remove it")
    if prompt_format is None:
        return Row({"prompt": prompt, "completion": "-"}, source)
    if prompt_format.format is RowFormat.messages:
        turns = [{"role": "system", "content": system}] if system is not None else []
        return Row({"messages": [*turns, {"role": "user", "content": prompt}]}, source)
    if prompt_format.format is RowFormat.text:
        return Row({"prompt": prompt}, source)
    values = {} if system is None else {"system": system}
    names = placeholders(prompt_format.template or "")
    free = [name for name in names if name not in values]
    if len(free) != 1:
        system_hint = ", or set system=TEXT as well" if "system" in free and len(free) == 2 else ""
        cause = f"prompt= fills one placeholder, the adapter's template has {listed(free)}"
        fix = f"write a file of rows with these columns: prompts=FILE{system_hint}"
        raise ConfigError(cause, where="prompt", fix=fix)
    return Row({free[0]: prompt, **values}, source)


def _has_system(prompt_format: PromptFormat | None) -> bool:
    if prompt_format is None or prompt_format.columns.get("system") == "":
        return False
    return "system" in used_columns(prompt_format, ())


def _is_empty(row: Row) -> bool:
    return all(is_blank(value) for value in row.columns.values())


def _asked(row: Row, prompt_format: PromptFormat, answer: str) -> Example:
    prompt, values = prompt_format.prompt(row.columns)
    earlier = 0
    if prompt_format.exchange_template:
        earlier = len(read_history(prompt_format.named(row.columns).get("history")))
    return Example(row.source, prompt, answer, prompt_values=values, history_answers=earlier)


def _conversation(
    row: Row, named: Mapping[str, Any], *, answered: bool = True
) -> Example | LeftOut:
    """The turns of a row under its system text, with their tools."""
    column = next((name for name in (*TURNS, "completion") if name in named), "prompt")
    if answered and says_nothing(named[column]):
        return LeftOut(row.source, f"every assistant turn of `{column}` is empty")
    messages = _turns(row, named, answered=answered)
    if not messages:
        return LeftOut(row.source, f"`{column}` is empty")
    system = as_text(named.get("system"), "system")
    if not is_blank(system):
        if messages[0].role in ("system", "developer"):
            fix = "keep one of them; data.columns.system= leaves the column out"
            raise DataError("a `system` column beside a system turn", where=row.source, fix=fix)
        messages = (Message("system", system), *messages)
    if answered:
        _check_supervised(messages)
    while not answered and messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    example = Example(row.source, messages=messages, tools=read_tools(named.get("tools")))
    _check_utf8(example)
    return example


def _check_supervised(messages: Sequence[Message]) -> None:
    own = [message for message in messages if message.role == "assistant"]
    if not own:
        fix = "add the assistant's answer, or remove the row"
        raise DataError("no assistant turn to learn from", fix=fix)
    if not any(message.supervised for message in own):
        masks = list(dict.fromkeys(message.masked_by for message in own))
        cause = f"no assistant turn to learn from, since all are masked ({', '.join(masks)})"
        raise DataError(cause, fix="unmask one (weight: 1, train: true), or remove the row")


def _turns(row: Row, named: Mapping[str, Any], *, answered: bool) -> tuple[Message, ...]:
    """Turns under ``messages`` (or ShareGPT's ``conversations``), or in prompt and completion."""
    column = next((name for name in TURNS if name in named), None)
    if column is not None:
        return read_turns(named[column], column) if named[column] is not None else ()
    prompt, completion = named.get("prompt"), named.get("completion")
    if not answered and not is_blank(prompt) and not is_turns(prompt):
        return (Message("user", as_text(prompt, "prompt")),)
    if "prompt" not in named or (answered and "completion" not in named):
        raise _missing("messages", row)
    if answered and (is_blank(completion) or completion == []):
        return ()
    context = read_turns(prompt or [], "prompt")
    answers = read_turns(completion or [], "completion") if answered else ()
    seen = (replace(turn, supervised=False, masked_by=IN_PROMPT) for turn in context)
    return (*seen, *answers)


def _check_utf8(example: Example) -> None:
    """Tools and the fields of turns may hold text that no tokenizer takes."""
    fields = [turn.fields for turn in example.messages if turn.fields]
    if fields or example.tools:
        as_text(json.dumps([fields, example.tools], ensure_ascii=False), "a text of a turn or tool")
