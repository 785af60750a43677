"""The checks on one file's syntax tree: keys, tags, values, the defaults list."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loratune.config.recipes.defaults import check_defaults
from loratune.config.recipes.rules import (
    interpolation_problem,
    is_instantiation_key,
    names_hydra,
    strings_in,
)
from loratune.config.recipes.yaml_reader import MERGE_TAG, bad_tag, line_of, plain, scalar_text
from loratune.config.schema import RunConfig
from loratune.config.settings import (
    Setting,
    has_no_effect,
    known_keys,
    unknown_key,
    wrong_type,
)
from loratune.errors import ConfigError, LoratuneError, SecurityError

KeyPath = tuple[str, ...]


@dataclass
class FileCheck:
    """The problems of one file.

    Attributes:
        shown: the file's name for messages.
        folder: its folder below the recipe folder, ``.`` for the top.
        folders: all recipe folders of the user, to look up choices in.
    """

    shown: str
    folder: str
    folders: list[Path]
    root: Setting = field(default_factory=lambda: known_keys(RunConfig))
    package: KeyPath = ()
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

    def visit(self, node: Node, path: KeyPath, setting: Setting | None, top: bool = False) -> None:
        """Check ``node``, which is the value of ``path``; ``setting`` is ``None`` if unknown."""
        if self.has_bad_tag(node, f"on {'.'.join(path) or 'the file'}"):
            return
        if isinstance(node, MappingNode):
            self._mapping(node, path, setting, top)
        elif isinstance(node, SequenceNode):
            inside = None if setting is None else Setting(object, free=True)
            for index, item in enumerate(node.value):
                self.visit(item, (*path[:-1], f"{path[-1]}[{index}]"), inside)
        elif problem := interpolation_problem(scalar_text(node)):
            self.security(line_of(node), f"{'.'.join(path)}: {problem}", "write the value itself")

    def _mapping(
        self, node: MappingNode, path: KeyPath, setting: Setting | None, top: bool
    ) -> None:
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            name = scalar_text(key)
            if not isinstance(key, ScalarNode) or (bad_tag(key) and key.tag != MERGE_TAG):
                cause = f"keys of {'.'.join(path) or 'the file'} must be plain strings"
                self.security(line_of(key), cause)
            elif key.tag == MERGE_TAG:
                self._merged(value, path, setting, top)
            elif name in first_lines:
                cause = f"'{'.'.join((*path, name))}' is set twice"
                places = f"lines {first_lines[name]} and {line_of(key)}"
                self.config(line_of(key), f"{cause} ({places})", "keep one")
            else:
                first_lines[name] = line_of(key)
                self._entry(key, value, (*path, name), setting, top)

    def _merged(self, value: Node, path: KeyPath, setting: Setting | None, top: bool) -> None:
        """``<<: *anchor`` puts the anchor's keys at this place."""
        for part in value.value if isinstance(value, SequenceNode) else [value]:
            if isinstance(part, MappingNode):
                self._mapping(part, path, setting, top)
            else:
                self.config(line_of(part), "'<<' needs a mapping")

    def _entry(
        self, key: Node, value: Node, path: KeyPath, setting: Setting | None, top: bool
    ) -> None:
        name, dotted = path[-1], ".".join(path)
        if is_instantiation_key(name):
            self.security(line_of(key), f"'{dotted}' would call a function")
        elif names_hydra(name):
            self.security(line_of(key), f"'{dotted}' would change Hydra's own settings")
        elif top and name == "defaults":
            check_defaults(self, value)
        elif setting is None:
            self.visit(value, path, None)
        elif (child := setting.child(name)) is None:
            where = f"{self.shown}:{line_of(key)}"
            self.errors.append(has_no_effect(path, where) or unknown_key(self.root, path, where))
            self.visit(value, path, None)
        else:
            self._value(value, path, child)

    def _value(self, node: Node, path: KeyPath, setting: Setting) -> None:
        before = len(self.errors)
        self.visit(node, path, setting)
        if len(self.errors) > before or (setting.children and isinstance(node, MappingNode)):
            return
        dotted, line = ".".join(path), line_of(node)
        try:
            value = plain(node)
        except ValueError as error:
            self.config(line, f"{dotted}: {error}")
            return
        if not setting.children and any("${" in text for text in strings_in(value)):
            return
        if allowed := wrong_type(setting, value):
            self.config(line, f"{dotted} must be {allowed}, got {value!r}", "fix the value")
