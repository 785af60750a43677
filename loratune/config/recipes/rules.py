"""What makes text more than data: rules on single words, shared by files and command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

INSTANTIATION_KEYS = frozenset(
    {"_target_", "_partial_", "_args_", "_recursive_", "_convert_", "_target_whitelist_"}
)
"""Keys by which Hydra builds objects from configuration."""

_PLAIN = re.compile(r"\$\{\s*\.*([A-Za-z_]\w*)(?:\.\w+|\[\w+\])*\s*\}", re.ASCII)
_SEGMENT = r"[A-Za-z0-9_](?:[\w+-]|\.(?!\.))*"
_PATH = rf"{_SEGMENT}(?:/{_SEGMENT})*"
_NAME = r"[A-Za-z_]\w*"
_PACKAGE = rf"(?:_here_|_group_|_global_(?:\.{_NAME})*|{_NAME}(?:\.{_NAME})*)"
_PACKAGE_ONLY = re.compile(_PACKAGE, re.ASCII)
_CHOICE = re.compile(_PATH, re.ASCII)
_GROUP = re.compile(rf"((?:optional |override )*) *(/?{_PATH})(?:@({_PACKAGE}))?", re.ASCII)


def is_instantiation_key(name: str) -> bool:
    """Whether a key is one of those that make Hydra call something."""
    return name.strip().casefold() in INSTANTIATION_KEYS


def names_hydra(name: str) -> bool:
    """Whether a key, group or package reaches Hydra's own configuration."""
    words = re.split(r"[\s./@:\[\]'\"]+", name.casefold())
    return "hydra" in words or any(word.endswith("_global_hydra") for word in words)


def interpolation_problem(text: str) -> str:
    """Why the interpolations in ``text`` are refused, or an empty string.

    Only a plain reference to another setting is data: ``${trainer.lr}``, ``${..rank}``.  A
    resolver (``${name:...}``) runs code.
    """
    position = text.find("${")
    while position >= 0:
        plain = _PLAIN.match(text, position)
        shown = text[position : position + 60]
        if plain and plain[1].casefold() == "hydra":
            return f"'{shown}' reads Hydra's own settings"
        if not plain:
            return f"'{shown}' is more than a reference to a setting"
        position = text.find("${", position + 2)
    return ""


def strings_in(value: Any) -> Iterator[str]:
    """Every text in nested plain values, the names of mappings left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def package_problem(package: str) -> tuple[bool, str]:
    """``(security, why)`` for a package (``# @package X``, ``group@X``); ``why`` empty if fine.

    Hydra takes what follows the *last* ``_global_`` anywhere in a package, and understands
    brackets; neither is allowed here.
    """
    if names_hydra(package) or "_global_" in package.removeprefix("_global_"):
        return True, f"the package '{package}' reaches Hydra's own settings"
    if not _PACKAGE_ONLY.fullmatch(package):
        return False, f"'{package}' is not a package: write _global_ or a dotted name"
    return False, ""


def leaves_folder(text: str) -> bool:
    """Whether a path tries to reach another folder or another kind of source."""
    return ".." in text or "://" in text or "//" in text or "\\" in text


def parse_group(text: str) -> tuple[str, str, str] | None:
    """``(keywords, path, package)`` of a key or string in a defaults list, or ``None``."""
    match = _GROUP.fullmatch(text)
    return (match[1].strip(), match[2], match[3] or "") if match else None


def is_choice(text: str) -> bool:
    """Whether ``text`` can name a file in a group: ``lora``, ``large/opt``."""
    return _CHOICE.fullmatch(text) is not None
