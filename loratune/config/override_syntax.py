"""The words of the command line in the form that Hydra takes."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.config.recipes.folders import parse_flags
from loratune.config.recipes.rules import names_hydra
from loratune.config.schema import RunConfig
from loratune.config.settings import Setting, find, known_keys


def prepare_overrides(arguments: Sequence[str], schema: type = RunConfig) -> list[str]:
    """The words for Hydra: settings first, then flags; ``+`` and ``++`` are ours to add.

    Hydra closes free mappings (``data.columns.prompt=question`` and ``data.columns={prompt: q}``
    fail), refuses ``+key`` for a key
    that exists, settings after a flag (``-m trainer.lr=1,2 --cfg job name=x``), and null for a
    group (``recipe=null``, which is the start anyway); all of them work after this.  Call it when
    ``check_overrides`` found nothing.
    """
    root = known_keys(schema)
    overrides = list(parse_flags(arguments).overrides)
    flags = list(arguments)
    for word in overrides:
        flags.remove(word)
    prepared = [_prepared(word, root) for word in overrides if word.lower() != "recipe=null"]
    return [*prepared, *flags]


def _prepared(word: str, root: Setting) -> str:
    bare = word.lstrip("+")
    key = bare.partition("=")[0].strip()
    path = tuple(key.split("."))
    if word.startswith("~") or names_hydra(key) or find(root, path) is None:
        return word
    inside = [find(root, path[:-1]), find(root, path)] if len(path) > 1 else []
    return f"++{bare}" if any(setting is not None and setting.free for setting in inside) else bare
