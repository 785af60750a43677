"""Where recipes come from: the package's own, and the user's, which come first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from loratune.errors import ConfigError


def builtin_recipes() -> Path:
    """The package's recipes: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def user_recipe_folders(config_dir: str | None = None) -> list[Path]:
    """``--config-dir`` and ``./recipes``, in the order of precedence, where they exist.

    In a checkout ``./recipes`` is the package's own folder, which is not the user's.

    Raises:
        ConfigError: if ``config_dir`` is not a folder.
    """
    folders = [Path("recipes")]
    if config_dir is not None:
        folders.insert(0, Path(config_dir))
        if not folders[0].is_dir():
            raise ConfigError("there is no such folder", where=f"--config-dir {config_dir}")
    builtin = builtin_recipes().resolve()
    by_place = {folder.resolve(): folder for folder in reversed(folders) if folder.is_dir()}
    return [folder for place, folder in reversed(by_place.items()) if place != builtin]


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
