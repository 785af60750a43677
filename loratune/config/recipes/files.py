"""One pass over the user's recipe files before Hydra acts on them: every problem, with its line.

A recipe is data.  What could make it more (object construction, Hydra's own settings, resolvers,
YAML tags, other folders) is refused; so are keys and types that the schema does not have.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from yaml.nodes import MappingNode, Node

from loratune.adapters.registry import variant_names
from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.nodes import FileCheck
from loratune.config.recipes.rules import names_hydra, package_problem
from loratune.config.recipes.yaml_reader import line_of, parse, read_text, scalar_text
from loratune.config.schema import RunConfig
from loratune.config.settings import GROUPS, find, known_keys
from loratune.errors import ConfigError, LoratuneError, SecurityError, choose_one


def check_recipe_files(folders: Sequence[Path], schema: type = RunConfig) -> list[LoratuneError]:
    """Every problem of every YAML file in ``folders``, each with file and line.

    Args:
        folders: the user's recipe folders, not the package's.
        schema: the dataclass of the command's settings.

    Returns:
        ``ConfigError`` and ``SecurityError`` objects, in the order of files and lines.
    """
    errors: list[LoratuneError] = []
    for folder in folders:
        for entry in _entries(folder, folder):
            if isinstance(entry, LoratuneError):
                errors.append(entry)
            else:
                errors += _check_file(entry, folder, folders, schema).errors
    return _once(errors)


def _once(errors: list[LoratuneError]) -> list[LoratuneError]:
    """Without repetitions: an alias shows the same line several times."""
    return list({(type(error), str(error)): error for error in errors}.values())


def _shown(path: Path) -> str:
    """A path as the user would type it: relative to where they stand, if it lies below."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _ignored(path: Path) -> bool:
    """Hidden folders, which no name can reach, and the dangling links that editors lock with."""
    return path.name.startswith(".") and (path.is_dir() or not path.exists())


def _entries(folder: Path, root: Path) -> Iterator[Path | LoratuneError]:
    """The files below ``folder`` whose names say YAML, and an error for what must not be read."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield ConfigError(f"unreadable: {error.strerror}", where=_shown(folder))
        return
    for path in (folder / name for name in names):
        if _ignored(path):
            continue
        if cause := _refusal(path, root):
            yield SecurityError(cause, where=_shown(path), fix="remove it")
        elif path.suffix.casefold() in (".yaml", ".yml"):
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _entries(path, root)


def _refusal(path: Path, root: Path) -> str:
    """Why ``path`` must not be read, or an empty string."""
    is_folder, at_top = path.is_dir(), path.parent == root
    if at_top and names_hydra(path.name) and (is_folder or path.stem.casefold() == "hydra"):
        return "a recipe folder cannot add to Hydra's own settings"
    if at_top and is_folder and path.name.casefold() == "schema":
        return "a recipe folder cannot replace the schema"
    if path.is_symlink():
        inside = Path(os.path.realpath(path)).is_relative_to(root.resolve())
        return "" if inside else "this link leads out of the recipe folder"
    if not is_folder and not stat.S_ISREG(path.lstat().st_mode):
        return "this is not a plain file"
    return ""


def _check_file(path: Path, root: Path, folders: Sequence[Path], schema: type) -> FileCheck:
    shown = _shown(path)
    relative = path.relative_to(root)
    check = FileCheck(shown, relative.parent.as_posix(), list(folders))
    try:
        if path.suffix != ".yaml" and not path.is_dir():
            check.config(1, "Hydra reads only names that end in .yaml", "rename it")
        if len(relative.parts) == 1 and (builtin_recipes() / path.name).exists():
            fix = f"move it to {_shown(root / 'recipe' / 'NAME.yaml')}"
            check.config(1, "this would replace the package's own root", fix)
        if len(relative.parts) == 1 and path.stem.casefold() == "schema":
            check.security(1, "this would replace the schema", "remove it")
        text = read_text(path, shown)
        package = _package(check, text)
        node = parse(text, shown)
        _check_document(check, node, package, schema)
    except LoratuneError as error:
        check.errors.append(error)
    return check


def _check_document(
    check: FileCheck, node: Node | None, package: tuple[str, ...], schema: type
) -> None:
    if node is None:
        check.config(1, "the file is empty", "remove it, or write settings")
        return
    if not isinstance(node, MappingNode):
        check.config(line_of(node), "the file is not a mapping", "write key: value")
        return
    root = known_keys(schema, _variant(node))
    setting = find(root, package)
    if setting is None:
        group = package[0]
        if group == "recipe":
            fix = "make '# @package _global_' its first line"
            check.config(1, "a recipe of several groups needs a package header", fix)
            setting = root
        else:
            cause = f"'{'.'.join(package)}' is not a group of settings"
            check.config(1, cause, choose_one(group, GROUPS))
    check.root, check.package = root, package
    check.visit(node, package if setting is not root else (), setting, top=True)


def _package(check: FileCheck, text: str) -> tuple[str, ...]:
    """Where the file's settings go: its header's word, or its folder.

    Hydra reads ``# @package X`` only in the leading lines that all are headers.
    """
    package = "" if check.folder == "." else check.folder.replace("/", ".")
    leading = True
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            break
        words = stripped.removeprefix("#").split()
        if not words or not words[0].startswith("@"):
            leading = leading and not stripped
            continue
        header = _header(check, number, stripped, words)
        if header is not None and leading:
            package = header.removeprefix("_global_").removeprefix(".")
        elif header is not None:
            fix = "make it the first line: Hydra ignores it below other comments"
            check.config(number, "this package header has no effect", fix)
    return tuple(package.split(".")) if package else ()


def _header(check: FileCheck, number: int, line: str, words: list[str]) -> str | None:
    """The package that a header line names; ``None`` if the line is refused."""
    if names_hydra(line):
        check.security(number, "a recipe cannot set Hydra's own settings", "remove this header")
        return None
    if words[0] != "@package" or len(words) != 2 or "\t" in line:
        check.config(number, "not a header that Hydra reads", "write '# @package _global_'")
        return None
    if words[1] == "_group_":
        return check.folder.replace("/", ".") if check.folder != "." else ""
    security, why = package_problem(words[1])
    if why:
        (check.security if security else check.config)(number, why, "write _global_")
        return None
    return words[1]


def _variant(node: MappingNode) -> str | None:
    """The adapter variant that a file settles, by ``variant:`` or by its defaults, if one."""
    for key, value in node.value:
        if key.value == "variant" and scalar_text(value) in variant_names():
            return scalar_text(value)
        if key.value != "defaults" or not isinstance(value.value, list):
            continue
        for entry in value.value:
            name = scalar_text(entry).partition("@")[0].rsplit("/", 1)[-1]
            if name in variant_names():
                return name
    return None
