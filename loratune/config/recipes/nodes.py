"""The checks on one file's syntax tree: keys, tags, values, the defaults list."""

from __future__ import annotations

from dataclasses import dataclass, field

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loratune.config.recipes.defaults import check_defaults
from loratune.config.recipes.notes import FileNotes
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
    is_text,
    known_keys,
    unknown_key,
    wrong_type,
)

KeyPath = tuple[str, ...]


@dataclass
class FileCheck(FileNotes):
    """A walk over one file's tree that notes its problems."""

    root: Setting = field(default_factory=lambda: known_keys(RunConfig))
    package: KeyPath = ()

    def visit(self, node: Node, path: KeyPath, setting: Setting | None, top: bool = False) -> None:
        """Check ``node``, which is the value of ``path``; ``setting`` is ``None`` if unknown."""
        if self.has_bad_tag(node, f"on {'.'.join(path) or 'the file'}"):
            return
        if isinstance(node, MappingNode):
            self._mapping(node, path, setting, top)
        elif isinstance(node, SequenceNode):
            inside = None if setting is None else setting.item or Setting(object, free=True)
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
            listed = "[" in name  # an element has no key of its own
            unknown = None if listed else has_no_effect(path, where)
            self.errors.append(unknown or unknown_key(self.root, path, where))
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
        if is_text(setting) and (other := _read_otherwise(node)):
            cause = f"YAML reads {other[0]} as {other[1]}, and {dotted} is text"
            self.config(line, cause, f"write '{other[0]}'")
        elif allowed := wrong_type(setting, value):
            self.config(line, f"{dotted} must be {allowed}, got {value!r}", "fix the value")


def _read_otherwise(node: Node) -> tuple[str, str] | None:
    """The first word of a text that YAML takes for a value written otherwise: ``no``, ``1e3``."""
    if isinstance(node, ScalarNode):
        value = plain(node)
        differs = value is not None and str(value) != node.value
        return (node.value, str(value)) if differs else None
    below = node.value if isinstance(node, SequenceNode) else [value for _, value in node.value]
    return next(filter(None, map(_read_otherwise, below)), None)
