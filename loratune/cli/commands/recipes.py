"""``loratune recipes``: list, show and copy recipe files."""

from __future__ import annotations

from pathlib import Path

from loratune.errors import ConfigError, did_you_mean

HELP = """loratune recipes: the recipe files there are, the package's and those in your ./recipes

usage: loratune recipes ls [GROUP]
       loratune recipes show NAME
       loratune recipes copy NAME [as=NEWNAME] [force=true]

NAME is a recipe (demo) or GROUP/NAME (adapter/vera).  copy writes the commented file to
./recipes/GROUP/NAME.yaml, where `loratune train GROUP=NAME` finds it before the package's own;
it overwrites nothing without force=true.
"""
_ACTIONS = ("ls", "show", "copy")


def run(arguments: list[str]) -> None:
    """Do what the first word says; ``ls`` where there is none."""
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP, end="")
        return
    action, rest = (arguments[0], arguments[1:]) if arguments else ("ls", [])
    names = [word for word in rest if "=" not in word]
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    if action == "ls":
        _check(options, ())
        _list(_one_at_most(names))
    elif action == "show":
        _check(options, ())
        _show(_exactly_one(names, action))
    elif action == "copy":
        _check(options, ("as", "force"))
        _copy(_exactly_one(names, action), options)
    else:
        fix = did_you_mean(action, _ACTIONS) or f"choose one of {', '.join(_ACTIONS)}"
        raise ConfigError(f"'{action}' is not an action", where="recipes", fix=fix)


def _list(group: str | None) -> None:
    from loratune.config.recipes.catalog import list_recipes
    from loratune.config.recipes.folders import user_recipe_folders
    from loratune.console import printable

    entries = list_recipes(user_recipe_folders([]), group)
    width = max(len(entry.name) for entry in entries)
    heading = ""
    for entry in entries:
        if entry.group != heading:
            heading = entry.group
            print(f"{heading}:")
        own = " (yours)" if entry.own else ""
        print(printable(f"  {entry.name:<{width}}  {entry.summary}{own}"))


def _show(name: str) -> None:
    from loratune.config.recipes.catalog import find_recipe
    from loratune.config.recipes.folders import user_recipe_folders
    from loratune.console import printable

    found = find_recipe(name, user_recipe_folders([]))
    print(f"# {printable(str(found.path))}\n")
    print(printable(found.text), end="" if found.text.endswith("\n") else "\n")


def _copy(name: str, options: dict[str, str]) -> None:
    from loratune.config.recipes.catalog import copy_recipe, find_recipe
    from loratune.config.recipes.folders import user_recipe_folders

    force = options.get("force", "false").lower()
    if force not in ("true", "false"):
        raise ConfigError(f"force must be true or false, got '{force}'", where="force")
    found = find_recipe(name, user_recipe_folders([]))
    path = copy_recipe(found, Path("recipes"), options.get("as"), force=force == "true")
    print(f"wrote {path}")
    print(f"use it: loratune train {found.group}={path.stem}")


def _check(options: dict[str, str], known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            fix = did_you_mean(key, known) or f"known here: {', '.join(known) or 'nothing'}"
            raise ConfigError(f"'{key}' is not a setting", where="recipes", fix=fix)


def _one_at_most(names: list[str]) -> str | None:
    if len(names) > 1:
        raise ConfigError("more than one group", where="recipes ls", fix="name one, or none")
    return names[0] if names else None


def _exactly_one(names: list[str], action: str) -> str:
    if len(names) != 1:
        raise ConfigError(
            "which recipe?", where=f"recipes {action}", fix=f"loratune recipes {action} NAME"
        )
    return names[0]
