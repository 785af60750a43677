"""A recipe is data: rows S01, S02, S08, S09, S10 and S12 from the command line to the exit code."""

from __future__ import annotations

import json
import os
import pickle

import pytest
from support.forked import Outcome, run_cli

from .world import World, refused

TOUCH = "touch CANARY"
HEAD = "# @package _global_\n"

# Each would run code, or open something outside, in a tool that instantiates what it reads.
HOSTILE = {
    "system": "model: {_target_: os.system, command: touch CANARY}",
    "alias": "trainer: {x: {_target_: logging.os.system, command: touch CANARY}}",
    "write": "data: {_target_: pathlib.Path.write_text, self: CANARY, data: x}",
    "copy": "adapter: {_target_: shutil.copy, src: /etc/passwd, dst: CANARY}",
    "url": "model: {_target_: urllib.request.urlopen, url: 'file:///etc/passwd'}",
    "load": "model: {_target_: torch.load, f: evil.pt, weights_only: false}",
    "method": "model: {_target_: hydra.utils.get_method, path: os.system}",
    "partial": "model: {_target_: os.system, _partial_: true}",
    "list": "stages: [{_target_: os.system, command: touch CANARY}]",
    "args": "model: {_target_: os.system, _args_: [touch CANARY]}",
    "callbacks": "hydra: {callbacks: {c: {_target_: os.system, command: touch CANARY}}}",
    "logging": "hydra: {job_logging: {formatters: {f: {'()': os.system, c: touch CANARY}}}}",
    "launcher": "hydra: {launcher: {_target_: os.system, command: touch CANARY}}",
    "run-dir": "hydra: {run: {dir: CANARY}}",
    "search-path": "hydra: {searchpath: ['file:///tmp']}",
}
DISGUISED = {
    "package": "# @package hydra.callbacks.c\n_target_: os.system\ncommand: touch CANARY\n",
    "override": HEAD + "defaults:\n  - override /hydra/job_logging: evil\n",
    "absolute": HEAD + "defaults:\n  - /hydra/callbacks@hydra.callbacks: evil\n",
}


def try_recipe(world: World, text: str, *words: str) -> Outcome:
    folder = world.path / "recipes" / "recipe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil.yaml").write_text(text)
    outcome = run_cli("train", "recipe=evil", *words, cwd=world.path)
    assert not world.canary.exists(), "the recipe ran"
    return outcome


@pytest.mark.parametrize("name", HOSTILE)
def test_a_recipe_cannot_name_code(world: World, name: str) -> None:
    """S01."""
    outcome = try_recipe(world, HEAD + HOSTILE[name] + "\n")
    refused(outcome, 9, "evil.yaml")
    assert outcome.seconds < 2 and world.left() == []


@pytest.mark.parametrize("name", DISGUISED)
def test_a_hydra_node_is_recognised_in_disguise(world: World, name: str) -> None:
    """S01: also before main()."""
    evil = world.path / "recipes" / "hydra" / "job_logging"
    evil.mkdir(parents=True)
    (evil / "evil.yaml").write_text("formatters: {f: {'()': os.system, command: touch CANARY}}\n")
    outcome = try_recipe(world, DISGUISED[name])
    refused(outcome, 9, "evil.yaml")
    assert outcome.seconds < 2 and world.left() == []


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
    """S01."""
    refused(run_cli("train", "recipe=smoke", word, cwd=world.path), 9, "_target_")
    assert world.left() == []


class _Touch:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (TOUCH,)


def test_the_flag_that_unpickles_is_refused(world: World) -> None:
    """S01."""
    (world.path / "config.pickle").write_bytes(pickle.dumps(_Touch()))
    outcome = run_cli("train", "--experimental-rerun", "config.pickle", cwd=world.path)
    assert outcome.code in (2, 9) and "Traceback" not in outcome.text
    assert not world.canary.exists() and world.left() == []


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch CANARY']",
        "name: !!python/name:os.system",
        "name: !evil x",
        "trainer: !!python/object/new:os.system [touch CANARY]",
    ],
)
def test_a_yaml_tag_is_refused(world: World, text: str) -> None:
    """S02."""
    outcome = try_recipe(world, HEAD + text + "\n")
    assert outcome.code in (2, 9)
    refused(outcome, outcome.code, "evil.yaml")


def bomb() -> str:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for one, other in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{one}: &{one} [{','.join([f'*{other}'] * 9)}]")
    return HEAD + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [bomb(), HEAD + "a: " + "[" * 10_000, HEAD + "a: " + "x" * (20 << 20)],
    ids=["aliases", "depth", "size"],
)
def test_a_yaml_bomb_costs_neither_time_nor_memory(world: World, text: str) -> None:
    """S08."""
    outcome = try_recipe(world, text)
    refused(outcome, 2, "evil.yaml")
    assert outcome.seconds < 2
    quiet = run_cli("train", "adapter.rnak=1", cwd=world.path)
    assert outcome.peak_bytes - quiet.peak_bytes < 250 << 20


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
    """S09, S10."""
    outcome = world.train(*words, env={"HF_TOKEN": TOKEN})
    assert outcome.code == code, outcome.err.replace(TOKEN, "TOKEN")
    assert hits(world, outcome) == []


def test_a_bug_does_not_print_the_secret_in_its_message(world: World) -> None:
    """S09: a crash with the token in a message and in a local variable."""

    def crash() -> None:
        from loratune.pipeline import run as pipeline

        def run(config: object) -> None:
            token = os.environ["HF_TOKEN"]
            raise RuntimeError(f"cannot sign in with {token}")

        pipeline.run = run

    outcome = world.train(env={"HF_TOKEN": TOKEN}, before=crash)
    assert outcome.code == 1 and "RuntimeError: cannot sign in with ***" in outcome.err
    assert hits(world, outcome) == []


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HOME"])
def test_a_recipe_cannot_read_the_environment(world: World, name: str) -> None:
    """S10."""
    outcome = try_recipe(world, f"{HEAD}name: ${{oc.env:{name}}}\n", "trainer.steps=1")
    refused(outcome, 9, "evil.yaml")


RAW = "\x1b]0;owned\x07\x1b[31mred\r[/foo][link=https://x]\u202e\x9b2J"


def harmless(outcome: Outcome) -> bool:
    controls = [c for c in outcome.text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]
    return not controls and "\u202e" not in outcome.text


def test_rows_cannot_command_the_terminal(world: World) -> None:
    """S12: escape sequences, bells, returns and markup in prompts and answers."""
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
    """S12: also in what Hydra itself says."""
    outcome = world.train(word)
    assert outcome.code in (2, 3, 4, 9) and "Traceback" not in outcome.text
    assert outcome.last.startswith("error[") and harmless(outcome)


def test_a_run_folder_is_named_safely(world: World) -> None:
    """S13: a name is not a path, and can be shown."""
    for name in ("../../escape", "/tmp/escape", ".hidden", "a/b", "x" * 101, "'a\x1bb'"):
        refused(run_cli("train", "recipe=smoke", f"name={name}", cwd=world.path), 2, "name")
    assert world.left() == [] and not list(world.path.parent.glob("escape*"))
