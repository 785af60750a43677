"""The words after a subcommand, read once: flags, settings, and the user's recipe folders."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import string
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException

from loratune.config.recipes.folders import group_options, user_recipe_folders
from loratune.config.recipes.rules import names_hydra
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact_text
from loratune.config.settings import GROUPS, Setting, find, is_text, known_keys
from loratune.errors import ConfigError

MAX_WORD = 20_000
MAX_BRACKETS = 200
_PAIRED = frozenset("[]{}'\"")
_PLAIN = frozenset(string.ascii_letters + string.digits + "_ \t/-\\+.$%*@?|:,")
"""What Hydra reads in a value without quotes."""
_FORM_SHOWN = 120


@dataclass(frozen=True)
class CommandLine:
    """The words after a subcommand.

    Attributes:
        flags: Hydra's own reading of its flags.
        flag_words: the flags and their values, as typed.
        overrides: every readable ``key=value``, in order, those for Hydra itself included.
        folders: the user's recipe folders, in the order of precedence.
        problems: one error for each word that cannot be read.
    """

    flags: Namespace
    flag_words: tuple[str, ...]
    overrides: tuple[Override, ...]
    folders: tuple[Path, ...]
    problems: tuple[ConfigError, ...] = ()

    @property
    def settings(self) -> list[Override]:
        """The overrides of the recipe, without those of Hydra itself."""
        return [one for one in self.overrides if not is_for_hydra(one)]

    @property
    def keys(self) -> set[str]:
        """The keys that are set: ``model.path=x`` sets ``model.path``."""
        return {override.key_or_group for override in self.overrides}

    @property
    def recipe(self) -> str | None:
        """The recipe that is chosen, if one is."""
        chosen = [one for one in self.overrides if one.key_or_group == "recipe"]
        return str(chosen[-1].value() or "") or None if chosen else None

    def job(self, words: Sequence[str]) -> CommandLine:
        """The command line of one job of a sweep, which has these words."""
        return replace(self, overrides=tuple(map(_parse, words)))

    def for_hydra(self, schema: type = RunConfig) -> list[str]:
        """The words for Hydra: settings first, then flags; ``+`` and ``++`` are ours to add.

        Hydra closes free mappings (``data.columns.prompt=question`` and
        ``data.columns={prompt: q}`` fail), refuses ``+key`` for a key that exists, settings after
        a flag (``-m trainer.lr=1,2 --cfg job name=x``), and null for a group (``recipe=null``,
        which is the start anyway); all of them work after this.  Call it when
        ``check_overrides`` found nothing.
        """
        root = known_keys(schema)
        words = [_for_hydra(one, root) for one in self.overrides if not _chooses_no_recipe(one)]
        return [*words, *self.flag_words]


def read_command_line(arguments: Sequence[str], schema: type = RunConfig) -> CommandLine:
    """Read the words after a subcommand.

    Args:
        arguments: the words.
        schema: the dataclass of the command's settings: where a setting is text, the word counts
            as it was typed (``name=true``, ``prompt=1e3``).

    Raises:
        ConfigError: for an unknown flag, or a ``--config-dir`` that does not exist.
    """
    flags = _parse_flags(arguments)
    flag_words = list(arguments)
    overrides, problems = list[Override](), list[ConfigError]()
    root = known_keys(schema)
    for word in flags.overrides:
        flag_words.remove(word)
        try:
            overrides.append(_as_typed(_parse(word), root))
        except ConfigError as error:
            problems.append(error)
    folders = tuple(user_recipe_folders(flags.config_dir))
    return CommandLine(flags, tuple(flag_words), tuple(overrides), folders, tuple(problems))


def is_for_hydra(override: Override) -> bool:
    """Whether an override is for Hydra itself, not for the recipe."""
    return override.is_hydra_override() or override.key_or_group == "hydra"


def _chooses_no_recipe(override: Override) -> bool:
    empty = not override.is_delete() and override.value() is None
    return override.key_or_group == "recipe" and empty


def _for_hydra(override: Override, root: Setting) -> str:
    word, key = str(override.input_line), override.key_or_group
    path = tuple(key.split("."))
    if override.is_delete() or names_hydra(key) or find(root, path) is None:
        return word
    inside = [find(root, path[:-1]), find(root, path)] if len(path) > 1 else []
    free = any(setting is not None and setting.free for setting in inside)
    return f"{'++' if free else ''}{word.lstrip('+')}"


def _parse_flags(arguments: Sequence[str]) -> Namespace:
    parser: argparse.ArgumentParser = get_args_parser()
    parser.error = _unknown_flag  # type: ignore[method-assign]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        return parser.parse_intermixed_args(list(arguments))
    return parser.parse_args([])


def _unknown_flag(message: str) -> NoReturn:
    fix = "see --help for the flags; settings are key=value"
    raise ConfigError(message, where="command line", fix=fix)


def _parse(word: str) -> Override:
    """Hydra's reading of one word.

    Raises:
        ConfigError: if it is not ``key=value``.
    """
    shown = redact_text(word if len(word) <= 80 else f"{word[:77]}...")
    if len(word) > MAX_WORD or sum(map(word.count, "[{(")) > MAX_BRACKETS:
        raise ConfigError(f"'{shown}' is too long", where="command line", fix="write a recipe")
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"'{shown}' is not key=value", where="command line", fix=_hint(word))
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except (HydraException, RecursionError) as error:
        raise _unreadable(word, shown) from error


def _as_typed(override: Override, root: Setting) -> Override:
    """An override of a text setting whose word Hydra would read as a number, true or false."""
    key, equals, text = str(override.input_line).partition("=")
    if override.is_delete() or not _is_text(root, tuple(override.key_or_group.split("."))):
        return override
    value = override.value()
    choices = value.list if isinstance(value, ChoiceSweep) and value.simple_form else [value]
    words = text.split(",") if isinstance(value, ChoiceSweep) else [text]
    if len(words) != len(choices) or not any(isinstance(one, (int, float)) for one in choices):
        return override
    typed = [
        QuotedString(word.strip(), Quote.double).with_quotes()
        if isinstance(choice, (int, float))
        else word
        for word, choice in zip(words, choices, strict=True)
    ]
    return _parse(f"{key}{equals}{','.join(typed)}")


def _is_text(root: Setting, path: tuple[str, ...]) -> bool:
    setting, parent = find(root, path), find(root, path[:-1])
    of_text = parent is not None and parent.free and is_text(parent)
    return setting is not None and (of_text or is_text(setting))


def _unreadable(word: str, shown: str) -> ConfigError:
    """A word that Hydra cannot read: which character needs quotes, and what to type."""
    key, _, value = word.partition("=")
    odd = next((char for char in value if char not in _PLAIN), "")
    form = shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")
    if len(form) > _FORM_SHOWN or not value.isprintable():
        form = f"'{key}=\"...\"'"
    cause, fix = f"cannot read '{shown}'", f"type {redact_text(form)}"
    if odd and odd not in _PAIRED:
        cause += f": {_character(odd)} needs quotes"
    else:
        fix = f"close every bracket and quote; if it is text, {fix}"
    return ConfigError(cause, where=key.lstrip("+~"), fix=fix)


def _character(char: str) -> str:
    names = {"\n": "a line break", "\r": "a line break", "\u00a0": "a no-break space"}
    return names.get(char) or (f"'{char}'" if char.isprintable() else f"U+{ord(char):04X}")


def _hint(word: str) -> str:
    for group in GROUPS:
        if word in group_options(group, []):
            return f"write {group}={word}"
    return "write key=value, for example trainer.steps=100"
