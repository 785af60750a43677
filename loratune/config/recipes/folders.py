"""Where recipes come from: the package's own, and the user's, which come first."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from loratune.errors import ConfigError


def builtin_recipes() -> Path:
    """The package's recipes: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's own reading of the command line: flags, and ``overrides``, the other words.

    Raises:
        ConfigError: for a flag that Hydra does not know.

    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        return parser.parse_intermixed_args(list(arguments))
    return parser.parse_args([])


def _refuse(message: str) -> NoReturn:
    fix = "see --help for the flags; settings are key=value"
    raise ConfigError(message, where="command line", fix=fix)


def user_recipe_folders(arguments: Sequence[str]) -> list[Path]:
    """``--config-dir`` and ``./recipes``, in the order of precedence, where they exist.

    In a checkout ``./recipes`` is the package's own folder, which is not the user's.

    Raises:
        ConfigError: if ``--config-dir`` names no folder.

    """
    folders = []
    named = parse_flags(arguments).config_dir
    if named is not None:
        folders.append(Path(named))
        if not folders[0].is_dir():
            raise ConfigError("there is no such folder", where=f"--config-dir {named}")
    folders.append(Path("recipes"))
    own = builtin_recipes().resolve()
    found = {folder.resolve(): folder for folder in reversed(folders) if folder.is_dir()}
    return [folder for place, folder in reversed(found.items()) if place != own]


def group_options(group: str, folders: Sequence[Path]) -> list[str]:
    """Names that ``group=NAME`` may choose, from ``folders`` and the package."""
    names = set()
    for folder in [*folders, builtin_recipes()]:
        base = folder / group
        for path in base.rglob("*.yaml") if base.is_dir() else ():
            name = path.relative_to(base).with_suffix("").as_posix()
            if not name.startswith(".") and "/." not in name:
                names.add(name)
    return sorted(names)


class UserRecipes(SearchPathPlugin):
    """Puts the user's folders before the package's, so that they add to and shadow it."""

    folders: ClassVar[list[Path]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.folders:
            search_path.prepend("user recipes", f"file://{folder.resolve()}", anchor="main")


def register_user_recipes(folders: Sequence[Path]) -> None:
    """Make Hydra search ``folders``, the first one first; in this process only."""
    UserRecipes.folders = list(folders)
    Plugins.instance().register(UserRecipes)
