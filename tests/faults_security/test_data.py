"""Faulty rows, and the bad input a first user brings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.command_line import Outcome

from .world import PROMPTS, World, refused

ROW = '{"prompt": "a b", "completion": "c d"}\n'


def on(world: World, path: object, *words: str, base: Path | None = None) -> Outcome:
    return world.train(f"data.path={path}", "data.eval_path=null", *words, base=base)


def test_a_pattern_or_folder_without_files_is_named(world: World) -> None:
    refused(on(world, f"'{world.path}/none*.jsonl'"), 3, "none*.jsonl")
    refused(on(world, world.path / "none.jsonl"), 3, "none.jsonl")
    (world.path / "empty").mkdir()
    refused(on(world, world.path / "empty"), 3, "empty", ".jsonl")
    assert world.left() == []


def test_a_named_pipe_is_refused_and_never_waited_for(world: World) -> None:
    os.mkfifo(world.path / "pipe.jsonl")
    outcome = on(world, world.path / "pipe.jsonl")
    refused(outcome, 3, "named pipe")
    assert world.left() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(world: World) -> None:
    path = world.rows(ROW)
    path.chmod(0)
    refused(on(world, path), 3, "rows.jsonl")


LATIN = (ROW * 4).encode() + b'{"prompt": "\xe9"}\n'


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        pytest.param(
            "rows.jsonl", ROW * 2 + '{"prompt": \n' + ROW, ["rows.jsonl:3"], id="cut-line"
        ),
        pytest.param("rows.jsonl", "", ["rows.jsonl"], id="empty"),
        pytest.param("rows.jsonl", (ROW * 2)[:-5], ["rows.jsonl:2"], id="cut-file"),
        pytest.param("rows.jsonl", LATIN, ["rows.jsonl:5"], id="latin-1"),
        pytest.param("rows.jsonl.gz", b"no gzip", ["rows.jsonl.gz"], id="gz"),
        pytest.param("rows.xyz", ROW, [".xyz", ".jsonl"], id="kind"),
        pytest.param(
            "rows.jsonl", '{"question": "a", "reply": "b"}\n' * 4, ["question"], id="columns"
        ),
    ],
)
def test_a_file_that_is_no_rows_is_named_with_its_line(
    world: World, name: str, content: str | bytes, named: list[str]
) -> None:
    outcome = on(world, world.rows(content, name))
    refused(outcome, 3, *named)
    assert world.left() == []


def test_rows_without_a_supervised_token_stop_the_run(world: World) -> None:
    """Every answer lies behind the cut."""
    outcome = on(world, world.rows(PROMPTS), "data.max_length=2")
    refused(outcome, 3, "12/12", "data.max_length")
    assert world.left() == []


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASK = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


def chat(world: World, turns: object, template: str | None = TEMPLATE) -> Outcome:
    base = world.new_base(tokenizer={"chat_template": template} if template else None)
    good = json.dumps({"messages": [ASK, ANSWER]}) + "\n"
    path = world.rows(good + json.dumps({"messages": turns}) + "\n")
    words = ["data.max_length=200", "trainer.batch_size=2"]
    return on(world, path, *words, base=base)


def test_a_conversation_trains(world: World) -> None:
    outcome = chat(world, [ASK, ANSWER, ASK, ANSWER])
    assert outcome.code == 0, outcome.err


def test_a_conversation_that_answers_nothing_is_left_out_by_name(world: World) -> None:
    outcome = chat(world, [ASK, {**ANSWER, "content": None}])
    assert outcome.code == 0, outcome.err
    assert "1 of 2 rows are left out: every assistant turn of `messages` is empty" in outcome.out
    assert "rows.jsonl:2" in outcome.out


@pytest.mark.parametrize(
    ("turns", "named"),
    [
        pytest.param([{"role": "wizard", "content": "x"}, ANSWER], "wizard", id="role"),
        pytest.param([ASK], "assistant", id="no-answer"),
        pytest.param([ASK, {**ANSWER, "content": None}, ASK, ANSWER], "empty", id="null"),
        pytest.param("hello", "list of turns", id="text"),
        pytest.param(["x"], "role", id="turn"),
        pytest.param([{"content": "x"}], "role", id="no-role"),
    ],
)
def test_an_unusable_conversation_is_named_with_its_line(
    world: World, turns: object, named: str
) -> None:
    refused(chat(world, turns), 3, "rows.jsonl:2", named)
    assert world.left() == []


@pytest.mark.parametrize(
    ("template", "named"),
    [
        pytest.param("{{ raise_exception('no!') }}", "no!", id="raises"),
        pytest.param("{% for %}", "broken", id="syntax"),
        pytest.param("{{ 1 / 0 }}", "division", id="division"),
        pytest.param("constant", "words", id="constant"),
        pytest.param(None, "chat template", id="none"),
    ],
)
def test_an_unusable_template_is_told_with_its_reason(
    world: World, template: str | None, named: str
) -> None:
    refused(chat(world, [ASK, ANSWER], template), 3, named)
    assert world.left() == []


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% set ns = lipsum.__globals__ %}{{ ns['os'].popen('touch CANARY') }}",
    ],
    ids=["time", "memory", "doubling", "power", "product", "globals", "classes", "lipsum"],
)
def test_a_hostile_template_is_stopped_in_time_and_in_memory(world: World, template: str) -> None:
    """Bounded in time and memory, inside its sandbox."""
    outcome = chat(world, [ASK, ANSWER], template)
    assert outcome.code in (3, 9) and outcome.errors and not outcome.has_traceback
    assert outcome.grown_bytes < 5e8
    assert not world.canary.exists() and world.left() == []
