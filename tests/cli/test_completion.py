"""Tab completion through the script that the shell evaluates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.adapters.registry import variant_names
from loratune.cli import COMMANDS
from loratune.cli.completion import complete

ASK = """
eval "$(loratune train -sc install=bash)"
for line in "$@"; do
  COMP_LINE="$line" COMP_POINT=${#line}; words=($line); COMP_CWORD=$((${#words[@]} - 1))
  hydra_bash_completion; echo "${COMPREPLY[@]}"
done
"""


def answers(line: str, monkeypatch, capsys) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    capsys.readouterr()
    assert complete(["-sc", "query=bash"]) == 0
    return capsys.readouterr().out.split()


def test_a_subcommand_is_completed(monkeypatch, capsys):
    assert answers("loratune exp", monkeypatch, capsys) == ["export"]
    assert answers("loratune ", monkeypatch, capsys) == list(COMMANDS)


def test_settings_of_the_subcommand_are_completed(monkeypatch, capsys):
    assert answers("loratune train trainer.st", monkeypatch, capsys) == ["trainer.steps="]
    assert "rank=" in answers("loratune count-params ra", monkeypatch, capsys)
    assert "rank=" not in answers("loratune train ra", monkeypatch, capsys)


def test_the_users_recipes_are_completed_too(monkeypatch, capsys):
    own = Path("recipes/recipe")
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nname: mine\n", encoding="utf-8")
    assert "recipe=mine" in answers("loratune train recipe=", monkeypatch, capsys)
    assert answers("loratune recipes show min", monkeypatch, capsys) == ["mine"]


def test_a_broken_recipe_does_not_write_into_the_line_being_typed(monkeypatch, capsys):
    own = Path("recipes/recipe")
    own.mkdir(parents=True)
    (own / "bad.yaml").write_text("[", encoding="utf-8")
    answers("loratune train recipe=bad adapter=", monkeypatch, capsys)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_bash_completes_with_the_installed_script(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", ASK, "-", "loratune train rec", "loratune train adapter="]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert result.stderr == ""
    first, second = result.stdout.splitlines()
    assert first == "recipe="
    assert second.split() == [f"adapter={name}" for name in variant_names()]
