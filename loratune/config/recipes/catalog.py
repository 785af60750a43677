"""The catalogue of recipe files: list, describe and copy them for the user to change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune import files
from loratune.config.recipes.folders import builtin_recipes, group_options
from loratune.config.recipes.variant_settings import recipe_file
from loratune.config.recipes.yaml_reader import read_text
from loratune.config.settings import GROUPS, unknown_group
from loratune.errors import ConfigError, StorageError, did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class RecipeFile:
    """One file that ``group=name`` chooses.

    Attributes:
        text: the whole file.
        summary: its first comment line that is neither a header nor a command.
        own: whether it is the user's, not the package's.
    """

    group: str
    name: str
    path: Path
    text: str
    summary: str
    own: bool


def list_recipes(folders: Sequence[Path], group: str | None = None) -> list[RecipeFile]:
    """Every recipe file, whole experiments first; the user's shadow the package's.

    Raises:
        ConfigError: if there is no such group.
    """
    if group is not None and group not in GROUPS:
        raise unknown_group(group, where="recipes")
    chosen = [group] if group else ["recipe", *(name for name in GROUPS if name != "recipe")]
    return [_entry(g, name, folders) for g in chosen for name in group_options(g, folders)]


def find_recipe(words: str, folders: Sequence[Path]) -> RecipeFile:
    """The file that ``NAME`` or ``GROUP/NAME`` means; a bare name is looked for in recipe/ first.

    Raises:
        ConfigError: if nothing, or more than one group, has it.
    """
    group, _, name = words.removesuffix(".yaml").replace("=", "/").rpartition("/")
    if group:
        list_recipes(folders, group)
    options = {g: group_options(g, folders) for g in ([group] if group else GROUPS)}
    groups = [g for g, names in options.items() if name in names]
    if not groups:
        names = sorted({option for names in options.values() for option in names})
        fix = did_you_mean(name, names) or "see `loratune recipes ls`"
        raise ConfigError(f"no recipe named '{words}'", where="recipes", fix=fix)
    if len(groups) > 1 and "recipe" not in groups:
        fix = f"write {' or '.join(f'{g}/{name}' for g in groups)}"
        raise ConfigError(f"'{name}' is in {len(groups)} groups", where="recipes", fix=fix)
    return _entry("recipe" if "recipe" in groups else groups[0], name, folders)


def copy_recipe(
    source: RecipeFile, folder: Path, new_name: str | None = None, *, force: bool = False
) -> Path:
    """Write the file, comments and all, to ``folder/GROUP/NAME.yaml``.

    Args:
        source: what to copy.
        folder: the user's recipes, usually ``./recipes``.
        new_name: another name; the commands in the comments then use it.
        force: overwrite a file that is there.

    Raises:
        ConfigError: for a name that is not one, or if ``folder`` is the package's own.
        StorageError: if the file exists, or cannot be written.
    """
    name = new_name or source.name
    if not _NAME.fullmatch(name) and name != source.name:
        raise ConfigError(f"'{name}' is not a name", where="as", fix="letters, digits, _ and -")
    target = folder / source.group / f"{name}.yaml"
    if folder.resolve() == builtin_recipes().resolve():
        raise ConfigError(
            "this folder's ./recipes is the package's own",
            where=str(folder.resolve()),
            fix="change to a folder of yours first",
        )
    if target.exists() and not force:
        raise StorageError("the file exists", where=str(target), fix="add force=true, or as=NAME")
    text = source.text if name == source.name else _renamed(source, name)
    with files.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, text)
    return target


def summary_of(text: str) -> str:
    """The first comment that describes the file (see ``RecipeFile``), up to its full stop."""
    sentences: list[str] = []
    for line in text.splitlines():
        words = line.removeprefix("#").strip()
        if not line.startswith("#") or not words:
            if line:
                break
        elif not words.startswith(("@package", "loratune ")):
            sentences.append(words)
            if words.endswith("."):
                break
    sentence = re.match(r".*?\.(?= |$)", " ".join(sentences))
    return sentence[0] if sentence and len(sentences) > 1 else " ".join(sentences)


def _entry(group: str, name: str, folders: Sequence[Path]) -> RecipeFile:
    path = recipe_file(group, name, folders)
    assert path is not None, f"{group}/{name} is listed and must exist"
    own = builtin_recipes().resolve() not in path.resolve().parents
    text = read_text(path, str(path))
    return RecipeFile(group, name, path, text, summary_of(text), own)


def _renamed(source: RecipeFile, name: str) -> str:
    """The text with its new name in the commands of its comments, and as a recipe's own name."""
    word = re.compile(rf"\b{source.group}={re.escape(source.name)}(?![\w.-])")
    lines = [
        word.sub(f"{source.group}={name}", line) if line.startswith("#") else line
        for line in source.text.splitlines(keepends=True)
    ]
    text = "".join(lines)
    if source.group == "recipe":
        text = re.sub(r"^name:.*$", f"name: {name}", text, count=1, flags=re.M)
    return text
