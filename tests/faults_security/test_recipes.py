"""A recipe is data from the command line to the exit code."""

from __future__ import annotations

import json
import os
import pickle

import pytest
from config.hostile import BOMBS, GLOBAL, HOSTILE
from support.command_line import Outcome

from .world import World, refused

TOUCH = "touch CANARY"


def try_file(world: World, name: str, content: str | bytes, *words: str) -> Outcome:
    path = world.path / "recipes" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = world.cli("train", *words, timeout=60)
    assert not world.canary.exists(), "the recipe ran"
    assert world.left() == []
    return outcome


@pytest.mark.parametrize("name", [n for n, (file, *_) in HOSTILE.items() if "recipe/" in file])
def test_a_recipe_cannot_name_code(world: World, name: str) -> None:
    """What the check of recipe files refuses, the command refuses: it checks before Hydra acts."""
    file, content, line = HOSTILE[name]
    refused(try_file(world, file, content, "recipe=x"), 9, f"recipes/{file}:{line}")


def test_a_hydra_group_of_the_users_own_is_refused(world: World) -> None:
    evil = world.path / "recipes" / "hydra" / "job_logging"
    evil.mkdir(parents=True)
    (evil / "evil.yaml").write_text("formatters: {f: {'()': os.system, command: touch CANARY}}\n")
    recipe = f"{GLOBAL}defaults:\n  - override /hydra/job_logging: evil\n"
    refused(try_file(world, "recipe/x.yaml", recipe, "recipe=x"), 9, "recipe/x.yaml")


@pytest.mark.parametrize(
    "word",
    [
        "+x._target_=os.system",
        "model._target_=os.system",
        "+trainer.x={_target_:os.system}",
        "+hydra.callbacks.c._target_=os.system",
        "hydra.launcher._target_=os.system",
    ],
)
def test_a_word_cannot_name_code_either(world: World, word: str) -> None:
    refused(world.cli("train", "recipe=smoke", word), 9, "_target_")
    assert world.left() == []


class _Touch:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (TOUCH,)


def test_the_flag_that_unpickles_is_refused(world: World) -> None:
    (world.path / "config.pickle").write_bytes(pickle.dumps(_Touch()))
    outcome = world.cli("train", "--experimental-rerun", "config.pickle")
    assert outcome.code in (2, 9) and "Traceback" not in outcome.text
    assert not world.canary.exists() and world.left() == []


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_bomb_costs_neither_time_nor_memory(world: World, name: str) -> None:
    outcome = try_file(world, "recipe/x.yaml", BOMBS[name], "recipe=x")
    refused(outcome, 2, "recipe/x.yaml")
    assert outcome.grown_bytes < 250 << 20


TOKEN = "CANARYTOK" + "4f9c2e7a1b"


def hits(world: World, outcome: Outcome) -> list[str]:
    """Where the token shows: streams, and every file but those that the test wrote."""
    streams = [name for name in ("out", "err") if TOKEN in getattr(outcome, name)]
    own = world.path / "recipes"
    made = [p for p in world.path.rglob("*") if p.is_file() and not p.is_relative_to(own)]
    return streams + [str(path) for path in made if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param([f"name={TOKEN}"], 0, id="value-of-a-variable"),
        pytest.param([f"+logger.api_key={TOKEN}"], 2, id="unknown-key"),
        pytest.param([f"trainer.lr={TOKEN}"], 2, id="wrong-type"),
        pytest.param([f"data.path=https://me:{TOKEN}@host/x.jsonl"], 3, id="address"),
        pytest.param([f"model.path=/none/{TOKEN}"], 4, id="missing-model"),
        pytest.param(["name='${oc.env:HF_TOKEN}'"], 9, id="reference"),
        pytest.param([f"recipe={TOKEN}"], 2, id="recipe"),
    ],
)
def test_a_secret_of_the_environment_shows_nowhere(
    world: World, words: list[str], code: int
) -> None:
    outcome = world.train(*words, environment={"HF_TOKEN": TOKEN})
    assert outcome.code == code, outcome.err.replace(TOKEN, "TOKEN")
    assert hits(world, outcome) == []


def test_a_bug_does_not_print_the_secret_in_its_message(world: World) -> None:
    """A crash with the token in a message and in a local variable."""
    crash = ["leak@loratune.pipeline.run.run:1"]
    outcome = world.train(environment={"HF_TOKEN": TOKEN}, faults=crash)
    assert outcome.code == 1 and "RuntimeError: cannot sign in with ***" in outcome.err
    assert hits(world, outcome) == []


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HOME"])
def test_a_recipe_cannot_read_the_environment(world: World, name: str) -> None:
    recipe = f"{GLOBAL}name: ${{oc.env:{name}}}\n"
    refused(try_file(world, "recipe/x.yaml", recipe, "recipe=x"), 9, "recipe/x.yaml")


RAW = "\x1b]0;owned\x07\x1b[31mred\r[/foo][link=https://x]\u202e\x9b2J"


def harmless(outcome: Outcome) -> bool:
    controls = [c for c in outcome.text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
    return not controls and "\u202e" not in outcome.text


def test_rows_cannot_command_the_terminal(world: World) -> None:
    """Escape sequences, bells, returns and markup in prompts and answers."""
    rows = [{"prompt": f"{n} {RAW} ", "completion": f"{RAW} {n}"} for n in range(8)]
    path = world.rows("".join(json.dumps(row) + "\n" for row in rows))
    outcome = world.train(
        f"data.path={path}", f"data.eval_path={path}", "data.test_path=null",
        "stages=[train,evaluate]", "evaluate.generate=true", "evaluate.max_new_tokens=2",
        "data.max_length=256", "trainer.batch_size=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "\\x1b" in outcome.out and "owned" in outcome.out, "the samples are shown, as text"
    assert harmless(outcome)


@pytest.mark.parametrize(
    "word",
    [f"trainer.lr={RAW}", f"{RAW}=1", f"recipe={RAW}", f"model.path=/x{RAW}", f"data.path='{RAW}'"],
    ids=["value", "key", "recipe", "model", "data"],
)
def test_words_cannot_command_the_terminal(world: World, word: str) -> None:
    """Also in what Hydra itself says."""
    outcome = world.train(word)
    assert outcome.code in (2, 3, 4, 9) and "Traceback" not in outcome.text
    assert outcome.last.startswith("error[") and harmless(outcome)


def test_a_run_folder_is_named_safely(world: World) -> None:
    """A name is not a path, and can be shown."""
    for name in ("../../escape", "/tmp/escape", ".hidden", "a/b", "x" * 101, "'a\x1bb'"):
        refused(world.cli("train", "recipe=smoke", f"name={name}"), 2, "name")
    assert world.left() == [] and not list(world.path.parent.glob("escape*"))
