"""What is wrong with one recipe file, noted as it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from yaml.nodes import Node

from loratune.config.recipes.yaml_reader import bad_tag, line_of
from loratune.errors import ConfigError, LoratuneError, SecurityError


@dataclass
class FileNotes:
    """The problems of one file.

    Attributes:
        shown: the file's name for messages.
        folder: its folder below the recipe folder, ``.`` for the top.
        folders: all recipe folders of the user, to look up choices in.
    """

    shown: str
    folder: str
    folders: list[Path]
    errors: list[LoratuneError] = field(default_factory=list)

    def config(self, line: int, cause: str, fix: str = "") -> None:
        """Note a mistake in ``line``."""
        self.errors.append(ConfigError(cause, where=f"{self.shown}:{line}", fix=fix))

    def security(self, line: int, cause: str, fix: str = "a recipe is data: remove it") -> None:
        """Note that ``line`` tries to be more than data."""
        self.errors.append(SecurityError(cause, where=f"{self.shown}:{line}", fix=fix))

    def has_bad_tag(self, node: Node, place: str) -> bool:
        """Note a tag that makes ``node`` more than plain data; whether it has one."""
        if tag := bad_tag(node):
            self.security(line_of(node), f"the YAML tag '{tag}' {place} is more than data")
        return bool(tag)
