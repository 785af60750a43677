"""A chat template that writes today's date: one moment for a run, whatever the day or the place."""

from __future__ import annotations

import json
import locale
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from loratune.config.schema import DataConfig
from loratune.data.clock import now, reads_clock, with_clock
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.templates import PromptFormat

from .conftest import byte_level_tokenizer

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + TURNS
ROWS = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}
]
CHRISTMAS = "2031-12-25T07:05:09"


def prepared(write_rows: Callable[..., Path], template: str, **options: Any) -> PreparedData:
    tokenizer = byte_level_tokenizer(start=False, pad=True, chat_template=template)
    config = DataConfig(path=str(write_rows(ROWS)))
    return prepare_data(config, tokenizer, len(tokenizer), 0, **options)


def words(data: PreparedData, template: str) -> str:
    tokenizer = byte_level_tokenizer(start=False, pad=True, chat_template=template)
    return str(tokenizer.decode(data.train[0].input_ids))


def rendered(template: str, moment: str) -> str:
    tokenizer = byte_level_tokenizer(start=False, pad=True)
    return str(
        tokenizer.apply_chat_template(
            ROWS[0]["messages"], chat_template=with_clock(template, moment), tokenize=False
        )
    )


def test_the_recorded_moment_is_what_the_template_writes(write_rows: Callable[..., Path]) -> None:
    data = prepared(write_rows, DATED, clock=CHRISTMAS)
    assert "Today is 25 December 2031." in words(data, DATED)
    assert data.prompt_format.clock == CHRISTMAS
    kept = PromptFormat.from_dict(json.loads(json.dumps(data.prompt_format.to_dict())))
    again = prepared(write_rows, DATED, prompt_format=kept)
    assert (again.train, again.encoded) == (data.train, data.encoded)


def test_another_day_is_seen_in_the_encoded_rows_alone(write_rows: Callable[..., Path]) -> None:
    one = prepared(write_rows, DATED, clock=CHRISTMAS)
    other = prepared(write_rows, DATED, clock="2031-12-26T07:05:09")
    assert one.fingerprint == other.fingerprint and one.encoded != other.encoded


def test_without_a_recorded_moment_it_is_now(write_rows: Callable[..., Path]) -> None:
    before, data, after = now(), prepared(write_rows, DATED), now()
    assert before <= str(data.prompt_format.clock) <= after


def test_a_template_that_reads_no_clock_records_none(write_rows: Callable[..., Path]) -> None:
    data = prepared(write_rows, TURNS, clock=CHRISTMAS)
    assert not reads_clock(TURNS) and with_clock(TURNS, CHRISTMAS) == TURNS
    assert "clock" not in data.prompt_format.to_dict()


@pytest.mark.parametrize(
    "directive",
    ["%Y-%m-%d", "%d %b %Y", "%A, %B %-d", "%a %e %H:%M:%S", "%I:%M %p", "%j", "%F %T", "100%%d"],
)
def test_every_usual_directive_is_what_transformers_would_write(directive: str) -> None:
    expected = datetime.fromisoformat(CHRISTMAS).strftime(directive)
    assert rendered(f"{{{{ strftime_now('{directive}') }}}}", CHRISTMAS) == expected


@pytest.mark.parametrize(
    "template",
    [
        "\n  {{ strftime_now('%Y') }}x\n",
        "  {%- if strftime_now is defined %}{{ strftime_now('%Y') ~ 'x' }}{% endif %}\n y",
        "{%- macro day() %}{{- strftime_now('%Y') }}x{% endmacro %}\n{{ day() }}",
        "{% set date = strftime_now('%Y') %}\n\n{% for m in messages %}{{ date }}{% endfor %}",
    ],
)
def test_everything_else_that_the_template_writes_stays(template: str) -> None:
    plain = template.replace("strftime_now is defined", "true").replace("strftime_now('%Y')", "'Y'")
    tokenizer = byte_level_tokenizer(start=False, pad=True)
    expected = tokenizer.apply_chat_template(
        ROWS[0]["messages"], chat_template=plain, tokenize=False
    )
    assert rendered(template, CHRISTMAS) == expected.replace("Y", "2031")


def test_neither_time_zone_nor_locale_changes_the_bytes(
    write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepared(write_rows, DATED, clock=CHRISTMAS).encoded
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    monkeypatch.setattr("loratune.data.clock.datetime", _InGerman)
    try:
        assert prepared(write_rows, DATED, clock=CHRISTMAS).encoded == here
    finally:
        monkeypatch.undo()
        time.tzset()
        locale.setlocale(locale.LC_TIME, "C")


class _InGerman(datetime):
    """What strftime gives under a German locale."""

    def strftime(self, format: str) -> str:
        text = super().strftime(format)
        return text.replace("December", "Dezember").replace("Dec", "Dez")
