"""Every shipped recipe composes with every variant, and says the truth about how to run it."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from loratune.adapters.registry import variant_names
from loratune.config.command_line import read_command_line
from loratune.config.overrides import check_overrides
from loratune.config.recipes.folders import builtin_recipes, group_options
from loratune.config.recipes.variant_settings import variant_settings
from loratune.config.schema import RunConfig

RECIPES = sorted(
    set(builtin_recipes().rglob("*.yaml")) - set(builtin_recipes().rglob("study/**/*.yaml"))
)
"""All but those of the study, which are run with --config-dir: tests/compare/test_study.py."""


def schema_of(command: str) -> type[RunConfig]:
    """The settings of a subcommand."""
    module = import_module(f"loratune.cli.commands.{command.replace('-', '_')}")
    return module.Config


def named(path: Path) -> str:
    return path.relative_to(builtin_recipes()).as_posix()


def commands(path: Path) -> list[list[str]]:
    """The commands of a file's comments; what follows two spaces describes them."""
    lines = re.findall(r"^# (loratune .*?)(?:  .*)?$", path.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("recipe", group_options("recipe", []))
@pytest.mark.parametrize("variant", variant_names())
def test_a_recipe_with_another_variant_gets_that_variants_numbers(recipe, variant, composed):
    config = composed(f"recipe={recipe}", f"adapter={variant}", "data.path=rows.jsonl")
    assert config.name == recipe
    assert config.adapter == variant_settings(variant)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.name != "config.yaml"], ids=named)
def test_a_recipe_file_opens_with_a_command_that_parses(path):
    found = commands(path)
    assert found, "the file opens with the command that runs it"
    for _, command, *words in found:
        assert check_overrides(read_command_line(words), schema_of(command)) == []


@pytest.mark.parametrize(
    "words",
    [words for path in RECIPES for words in commands(path) if "-m" not in words],
    ids=" ".join,
)
def test_the_command_in_a_recipe_composes(words, composed):
    _, command, *rest = words
    config = composed(*rest, command=command, schema=schema_of(command))
    assert config.adapter.variant in variant_names()


def test_the_users_recipe_adds_to_and_shadows_the_packages(composed):
    own = Path("recipes/adapter")
    own.mkdir(parents=True)
    text = (builtin_recipes() / "adapter" / "lora.yaml").read_text(encoding="utf-8")
    (own / "lora.yaml").write_text(text.replace("rank: 8", "rank: 5"), encoding="utf-8")
    (own / "wide.yaml").write_text("defaults: [lora, _self_]\nrank: 64\n", encoding="utf-8")
    assert composed("adapter=lora").adapter.rank == 5
    assert composed("adapter=wide").adapter.rank == 64
    assert variant_settings("lora", (Path("recipes"),)).rank == 5
