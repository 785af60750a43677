"""Which recipe files a command will read: those it names, and those that they name in turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loratune.config.recipes.folders import builtin_recipes
from loratune.config.recipes.yaml_reader import parse, read_text, scalar_text
from loratune.config.settings import GROUPS
from loratune.errors import LoratuneError

Name = tuple[str, str]
"""The last folder and the stem of a recipe file; with the first empty, a file at the top."""

_PLAIN_CHOICES = re.compile(r"[\w./,+\-]*")


class UsedFiles:
    """The recipe files that Hydra will read for a command line; rather too many than too few.

    Args:
        overrides: the words of the command line.
        folders: the user's recipe folders.
    """

    def __init__(self, overrides: Sequence[Override], folders: Sequence[Path]) -> None:
        self._folders = (*folders, builtin_recipes())
        self._names: set[Name] = {("", "config")}
        # Behind a link to a folder, a file has a second name.
        paths = (path for folder in folders for path in folder.rglob("*"))
        self._all = any(path.is_symlink() and path.is_dir() for path in paths)
        for override in overrides:
            group = override.key_or_group.partition("@")[0]
            if group.rpartition("/")[2] in GROUPS:
                self._choose(group, str(override.input_line or "").partition("=")[2])
        self._follow()

    def __contains__(self, path: object) -> bool:
        """Whether a file below one of the folders is read."""
        return isinstance(path, Path) and any(
            self._all or _name(path.relative_to(folder).as_posix()) in self._names
            for folder in self._folders
            if path.is_relative_to(folder)
        )

    def _choose(self, group: str, choices: str) -> None:
        if _PLAIN_CHOICES.fullmatch(choices) and ".." not in choices:
            self._names |= {_name(f"{group}/{choice}") for choice in choices.split(",")}
        else:  # glob(*), quotes, references: it may be any of them
            self._all = True

    def _follow(self) -> None:
        """Add what the files in use name in their defaults, until there is nothing new."""
        followed: set[Path] = set()
        while not self._all:
            paths = [path for path in self._files() if path not in followed and path in self]
            if not paths:
                return
            for path in paths:
                followed.add(path)
                for name in self._defaults(path):
                    self._all = self._all or any(mark in name for mark in ("$", "?", "*", ".."))
                    self._names.add(_name(name))

    def _files(self) -> Iterator[Path]:
        for folder in self._folders:
            yield from (path for path in folder.rglob("*.yaml") if path.is_file())

    def _defaults(self, path: Path) -> Iterator[str]:
        """The files that a file names, each as GROUP/NAME."""
        folder = next(folder for folder in self._folders if path.is_relative_to(folder))
        own = path.relative_to(folder).parent.as_posix()
        try:
            node = parse(read_text(path, str(path)), str(path))
        except LoratuneError:
            return  # it will be refused as a file in use
        for key, value in node.value if isinstance(node, MappingNode) else ():
            if scalar_text(key) == "defaults" and isinstance(value, SequenceNode):
                for entry in value.value:
                    yield from _named(entry, own)


def _named(entry: Node, own: str) -> Iterator[str]:
    """What one entry of a defaults list names: NAME, GROUP: NAME or GROUP: [NAME, ...]."""
    if isinstance(entry, ScalarNode):
        yield f"{own}/{scalar_text(entry)}"
    for key, value in entry.value if isinstance(entry, MappingNode) else ():
        group = scalar_text(key).rpartition(" ")[2].partition("@")[0]
        for choice in value.value if isinstance(value, SequenceNode) else (value,):
            yield f"{own}/{group}/{scalar_text(choice)}"


def _name(path: str) -> Name:
    parts = path.partition("@")[0].removesuffix(".yaml").strip("/").split("/")
    folder, stem = ["", *parts][-2:]
    return ("" if folder == "." else folder).casefold(), stem.casefold()
