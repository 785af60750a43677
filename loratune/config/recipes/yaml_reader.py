"""YAML read within bounds: a hostile file costs milliseconds, and every problem has a line.

The grammar is OmegaConf's own loader, so that what is checked is what Hydra will read.
"""

from __future__ import annotations

import codecs
import io
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loratune.errors import ConfigError, SecurityError

MAX_BYTES = 100_000
"""Largest recipe file, also with its aliases written out: the parser reads 200 kB a second."""
MAX_DEPTH = 30
"""Deepest nesting; the schema needs four levels."""

_PREFIX = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_PREFIX + name for name in ("str", "int", "float", "bool", "null")}
_ALLOWED_TAGS: dict[type[Node], set[str]] = {
    ScalarNode: _SCALAR_TAGS,
    SequenceNode: {_PREFIX + "seq"},
    MappingNode: {_PREFIX + "map"},
}
MERGE_TAG = _PREFIX + "merge"


@cache
def _loader() -> Any:
    class BoundedLoader(get_yaml_loader()):  # type: ignore[misc]
        """OmegaConf's loader with bounds on nesting and size, both with aliases written out.

        An alias costs nothing to write, but much to read.
        """

        def __init__(self, text: str, shown: str) -> None:
            super().__init__(text)
            self.name, self.depth = shown, 0
            self.extents: dict[int, tuple[int, int]] = {}  # node to its size and height

        def compose_node(self, parent: Node | None, index: Any) -> Node:
            mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
            self.depth += 1
            _check_bounds(mark, 0, self.depth)
            node: Node = super().compose_node(parent, index)
            self.depth -= 1
            if is_alias and id(node) not in self.extents:
                raise _out_of_bounds(mark, "an alias contains itself")
            parts = [self.extents[id(part)] for part in children(node)]
            size = 1 + sum(size for size, _ in parts)
            height = 1 + max((height for _, height in parts), default=0)
            self.extents[id(node)] = size, height
            _check_bounds(mark, size, height)
            return node

    return BoundedLoader


def _check_bounds(mark: yaml.Mark, size: int, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _out_of_bounds(mark, f"nested deeper than {MAX_DEPTH} levels")
    if size > MAX_BYTES:
        raise _out_of_bounds(mark, f"more than {MAX_BYTES:,} values with its aliases written out")


def _out_of_bounds(mark: yaml.Mark, cause: str) -> ConfigError:
    where = f"{mark.name}:{mark.line + 1}"
    return ConfigError(cause, where=where, fix="a recipe is a page of text")


def read_text(path: Path, shown: str) -> str:
    """The text of a regular file of at most ``MAX_BYTES``, decoded as Hydra decodes it.

    Raises:
        SecurityError: for a FIFO, device or socket.
        ConfigError: for a folder, a file too large, or one that is not UTF-8.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError("this is a folder, not a recipe", where=shown, fix="rename it")
        if not stat.S_ISREG(mode):
            raise SecurityError("this is not a plain file", where=shown, fix="remove it")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"unreadable: {error.strerror}", where=shown) from error
    if len(content) > MAX_BYTES:
        fix = "a recipe is a page of text; put rows into data.path"
        raise ConfigError(f"larger than {MAX_BYTES:,} bytes", where=shown, fix=fix)
    if content.startswith(codecs.BOM_UTF8):  # Hydra would not see the header behind it
        raise ConfigError("a byte order mark", where=f"{shown}:1", fix="save as UTF-8 without BOM")
    try:
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError("not UTF-8 text", where=f"{shown}:{line}", fix="save as UTF-8") from error


def parse(text: str, shown: str) -> Node | None:
    """The document's syntax tree, aliases shared; ``None`` for an empty file.

    Raises:
        ConfigError: for a syntax error or a bound that is exceeded.
    """
    try:
        node: Node | None = _loader()(text, shown).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{shown}:{mark.line + 1}:{mark.column + 1}" if mark else shown
        raise ConfigError(f"not YAML: {_reason(error, text)}", where=place) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        cause = f"a character that YAML does not allow: #x{error.character:04x}"
        raise ConfigError(cause, where=f"{shown}:{line}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=shown) from None
    return node


def _reason(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark
    lines = text.splitlines()
    if mark is not None and mark.line < len(lines) and "\t" in lines[mark.line]:
        return "a tab where spaces are needed"
    if error.context and error.problem:
        return f"{error.problem} ({error.context})"
    return str(error.problem or error.context or "syntax error")


def children(node: Node) -> list[Node]:
    """The nodes directly below ``node``: keys and values, or items."""
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def scalar_text(node: Node) -> str:
    """The text of a scalar, or an empty string."""
    return str(node.value) if isinstance(node, ScalarNode) else ""


def line_of(node: Node) -> int:
    """The line where a node starts, counted from one."""
    return int(node.start_mark.line) + 1


def bad_tag(node: Node) -> str:
    """The node's tag if it is more than plain data, else an empty string."""
    return "" if node.tag in _ALLOWED_TAGS[type(node)] else node.tag.removeprefix(_PREFIX)


def plain(node: Node) -> Any:
    """The value of a node whose tags are all plain; scalars become what OmegaConf makes of them.

    Raises:
        ValueError: for an explicit tag that the text does not fit.
    """
    if isinstance(node, SequenceNode):
        return [plain(item) for item in node.value]
    if isinstance(node, MappingNode):
        return {str(plain(key)): plain(value) for key, value in node.value}
    try:
        return _loader()("", "").construct_object(node)
    except (KeyError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
