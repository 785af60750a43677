"""The defaults list of a recipe file: it may choose among the groups, and nothing else."""

from __future__ import annotations

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loratune.config.recipes.folders import group_options
from loratune.config.recipes.notes import FileNotes
from loratune.config.recipes.rules import (
    interpolation_problem,
    is_choice,
    leaves_folder,
    names_hydra,
    package_problem,
    parse_group,
)
from loratune.config.recipes.yaml_reader import bad_tag, line_of, scalar_text
from loratune.config.settings import GROUPS
from loratune.errors import choose_one, did_you_mean


def check_defaults(notes: FileNotes, node: Node) -> None:
    """Note every entry that reaches beyond the groups, or that names nothing."""
    if notes.has_bad_tag(node, "on defaults"):
        return
    if not isinstance(node, SequenceNode):
        notes.config(line_of(node), "defaults must be a list", "write '- override /adapter: lora'")
        return
    for entry in node.value:
        if not notes.has_bad_tag(entry, "in defaults"):
            _check_entry(notes, entry, line_of(entry))


def _check_entry(notes: FileNotes, entry: Node, line: int) -> None:
    if isinstance(entry, ScalarNode):
        if entry.value != "_self_":
            _check_group(notes, line, entry.value, None)
    elif isinstance(entry, MappingNode) and len(entry.value) == 1:
        key, value = entry.value[0]
        if not isinstance(key, ScalarNode) or bad_tag(key):
            notes.security(line, "keys in defaults must be plain strings")
        else:
            _check_group(notes, line, key.value, value)
    else:
        notes.config(line, "an entry of defaults must be NAME or GROUP: NAME")


def _check_group(notes: FileNotes, line: int, text: str, value: Node | None) -> None:
    """One entry: ``text`` alone, or ``text: value``."""
    _, _, package = text.partition("@")
    if names_hydra(text) or (package and package_problem(package)[0]):
        notes.security(line, f"'{text}' in defaults reaches Hydra's own settings")
        return
    if leaves_folder(text) or "${" in text:
        notes.security(line, f"'{text}' in defaults leaves the recipe folders")
        return
    parsed = parse_group(text)
    if parsed is None:
        notes.config(line, f"'{text}' in defaults is not a group", "write 'override /GROUP: NAME'")
        return
    keywords, path, _ = parsed
    group, names = _choices(notes, path, value)
    if value is not None and names is None:
        _check_choice_node(notes, line, value)
    elif "optional" not in keywords.split():
        _check_exists(notes, line, path, group, names or [])


def _choices(notes: FileNotes, path: str, value: Node | None) -> tuple[str, list[str] | None]:
    """The absolute group of an entry, and the names chosen in it (``None``: not plain names)."""
    base = "" if path.startswith("/") or notes.folder == "." else f"{notes.folder}/"
    full = base + path.removeprefix("/")
    if value is None:
        group, _, name = full.rpartition("/")
        return group, [name]
    if isinstance(value, ScalarNode) and value.tag.endswith(":null"):
        return full, []
    items = _items(value)
    texts = [scalar_text(item) for item in items if not bad_tag(item)]
    plain = len(texts) == len(items) and all(map(is_choice, texts))
    return full, texts if plain else None


def _items(value: Node) -> list[Node]:
    return value.value if isinstance(value, SequenceNode) else [value]


def _check_choice_node(notes: FileNotes, line: int, value: Node) -> None:
    for item in _items(value):
        text = scalar_text(item)
        if notes.has_bad_tag(item, "in defaults"):
            continue
        if "${" in text:
            if problem := interpolation_problem(text):
                notes.security(line, f"defaults: {problem}", "name the choice itself")
            elif not text.startswith("${") or text.count("}") != 1 or not text.endswith("}"):
                notes.security(line, f"'{text}' in defaults builds a path", "name the choice")
        elif leaves_folder(text) or text.startswith(("/", ".")) or names_hydra(text):
            notes.security(line, f"'{text}' in defaults leaves the recipe folders")
        elif not is_choice(text):
            notes.config(line, f"'{text}' in defaults is not a name")


def _check_exists(notes: FileNotes, line: int, path: str, group: str, names: list[str]) -> None:
    top = group.partition("/")[0]
    if names_hydra("/".join([group, *names])):
        notes.security(line, f"'{path}' in defaults reaches Hydra's own settings")
    elif not path.startswith("/") and path.partition("/")[0] in GROUPS and notes.folder != ".":
        cause = f"'{path}' in defaults is looked for in {notes.folder}/"
        notes.config(line, cause, f"write /{path}")
    elif top == "schema" or not group:
        return
    elif top not in GROUPS:
        notes.config(line, f"'{top}' in defaults is not a group", choose_one(top, GROUPS))
    else:
        options = group_options(group, notes.folders)
        for name in names:
            if options and name not in options:
                fix = did_you_mean(name, options) or f"available: {', '.join(options)}"
                notes.config(line, f"no {group} named '{name}'", fix)
