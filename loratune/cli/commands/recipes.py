"""``loratune recipes``: list, show and copy recipe files."""

from __future__ import annotations

from pathlib import Path

from loratune.cli.arguments import read_arguments
from loratune.config.recipes.catalog import copy_recipe, find_recipe, list_recipes
from loratune.config.recipes.folders import user_recipe_folders
from loratune.console import printable
from loratune.errors import ConfigError, choose_one

HELP = """loratune recipes: the recipe files there are, the package's and those in your ./recipes

usage: loratune recipes ls [GROUP]
       loratune recipes show NAME
       loratune recipes copy NAME [as=NEWNAME] [force=true]

NAME is a recipe (demo) or GROUP/NAME (adapter/vera).  copy writes the commented file to
./recipes/GROUP/NAME.yaml, where `loratune train GROUP=NAME` finds it before the package's own;
it overwrites nothing without force=true.
"""
ACTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "ls": {},
    "show": {},
    "copy": {"as": (), "force": ("true", "false")},
}
"""Actions, and the settings that each takes with their choices."""


def run(arguments: list[str]) -> None:
    """Do what the first word says; ``ls`` where there is none."""
    action, rest = (arguments[0], arguments[1:]) if arguments else ("ls", [])
    if action not in ACTIONS:
        fix = choose_one(action, ACTIONS)
        raise ConfigError(f"'{action}' is not an action", where="recipes", fix=fix)
    names, values = read_arguments(rest, ACTIONS[action])
    if action == "ls":
        _list(names)
        return
    if len(names) != 1:
        fix = f"loratune recipes {action} NAME"
        raise ConfigError("which recipe?", where=f"recipes {action}", fix=fix)
    if action == "show":
        _show(names[0])
    else:
        _copy(names[0], values.get("as"), force=values.get("force") == "true")


def _list(groups: list[str]) -> None:
    if len(groups) > 1:
        raise ConfigError("more than one group", where="recipes ls", fix="name one, or none")
    entries = list_recipes(user_recipe_folders(), *groups)
    width = max(len(entry.name) for entry in entries)
    heading = ""
    for entry in entries:
        if entry.group != heading:
            heading = entry.group
            print(f"{heading}:")
        own = " (yours)" if entry.own else ""
        print(printable(f"  {entry.name:<{width}}  {entry.summary}{own}"))


def _show(name: str) -> None:
    recipe = find_recipe(name, user_recipe_folders())
    print(f"# {printable(str(recipe.path))}\n")
    print(printable(recipe.text), end="" if recipe.text.endswith("\n") else "\n")


def _copy(name: str, new_name: str | None, *, force: bool) -> None:
    recipe = find_recipe(name, user_recipe_folders())
    path = copy_recipe(recipe, Path("recipes"), new_name, force=force)
    print(f"wrote {path}")
    print(f"use it: loratune train {recipe.group}={path.stem}")
