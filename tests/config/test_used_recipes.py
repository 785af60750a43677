"""A broken recipe file stops the commands that use it, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import CommandLine

from loratune.config.command_line import read_command_line
from loratune.config.recipes.reach import UsedFiles

GLOBAL = "# @package _global_\n"
FILES = {
    "recipe/mine.yaml": GLOBAL + "defaults:\n  - override /adapter: wide\n",
    "recipe/sub/deep.yaml": GLOBAL + "defaults:\n  - override /data: [own]\n  - /recipe/mine\n",
    "recipe/any.yaml": GLOBAL + "defaults:\n  - override /data: ${name}\n",
    "recipe/sub/above.yaml": GLOBAL + "defaults:\n  - ../mine\n",
    "adapter/wide.yaml": "defaults:\n  - lora\nrank: 32\n",
    "adapter/lora.yaml": "rank: 4\n",
    "data/own.yaml": "max_length: 8\n",
    "data/wide.yaml": "max_length: 9\n",
    "trainer/default.yaml": "steps: 3\n",
}
ALWAYS = {"adapter/lora.yaml", "trainer/default.yaml"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(files: dict[str, str]) -> None:
    for name, text in files.items():
        path = Path("recipes", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ALWAYS),
        (["trainer.steps=2"], ALWAYS),
        (["recipe=mine"], {*ALWAYS, "recipe/mine.yaml", "adapter/wide.yaml"}),
        (["adapter=wide", "data=own"], {*ALWAYS, "adapter/wide.yaml", "data/own.yaml"}),
        (["data=own,wide"], {*ALWAYS, "data/own.yaml", "data/wide.yaml"}),
        (
            ["+recipe=sub/deep"],
            {*ALWAYS, "recipe/sub/deep.yaml", "recipe/mine.yaml", "adapter/wide.yaml",
             "data/own.yaml"},
        ),
        (["recipe=any"], set(FILES)),
        (["recipe=sub/above"], set(FILES)),
        (["data=glob(*)"], set(FILES)),
    ],
)  # fmt: skip
def test_what_is_named_is_used_and_what_that_names(words: list[str], expected: set[str]) -> None:
    write(FILES)
    line = read_command_line(words)
    used = UsedFiles(line.overrides, line.folders)
    assert {name for name in FILES if Path("recipes", name) in used} == expected


def test_behind_a_link_to_a_folder_everything_is_used() -> None:
    write(FILES)
    Path("recipes/model").symlink_to("data")
    line = read_command_line([])
    assert Path("recipes/data/own.yaml") in UsedFiles(line.overrides, line.folders)


def test_a_broken_file_stops_only_what_uses_it(cli: CommandLine) -> None:
    write({"recipe/broken.yaml": GLOBAL + "trainer:\n  stepps: 3\n"})
    run = ("train", "recipe=smoke", "stages=[train]", "trainer.steps=2", "out=run")
    warned = cli.succeeds(*run)
    assert "warning: a recipe that is not used here is broken: recipes/recipe/broken.yaml:3" in (
        warned.err
    )
    assert "stepps" in warned.err
    for words in (["evaluate", "run=run", "evaluate.generate=false"], ["train", "resume=run"]):
        assert "broken.yaml:3" in cli.succeeds(*words).err
    assert "broken.yaml:3" in cli.refuses("train", "recipe=broken")
