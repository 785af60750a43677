"""``data.sources``: what a list of sources must be, and what each of them is called."""

from __future__ import annotations

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import PurePath
from typing import Any

from loratune.config.schema import DataConfig
from loratune.errors import ConfigError, DataError, LoratuneError, did_you_mean
from loratune.files import BUILTIN

SOURCES = "data.sources"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of files of rows; the text kinds may have ``.gz`` after them."""
_NAME = re.compile(r"\w[\w.-]{0,59}")


def source_name(source: Mapping[str, Any]) -> str:
    """The source's name, else its file's without its kind: ``rows`` for ``data/rows.jsonl.gz``."""
    if source.get("name") is not None:
        return str(source["name"])
    last = PurePath(str(source.get("path") or "").removeprefix(BUILTIN)).name
    stem, kind = os.path.splitext(last.removesuffix(".gz"))
    return stem if kind.lower() in SUFFIXES else last


def sources_of(data: DataConfig) -> dict[str, DataConfig]:
    """Each source of a mixture by its name, with its own settings in place of ``data``'s."""
    settings = {}
    for source in data.sources or []:
        own = asdict(source)
        name = source_name(own)
        del own["name"], own["weight"]
        given = {key: value for key, value in own.items() if value is not None}
        settings[name] = replace(data, sources=None, **given)
    return settings


def source_weights(data: DataConfig) -> dict[str, float]:
    """Name to weight of every source, in the order of the recipe."""
    return {source_name(asdict(source)): source.weight for source in data.sources or []}


def training_paths(data: DataConfig) -> list[str]:
    """Where the training rows lie."""
    named = [source.path for source in data.sources or []]
    return named or ([] if data.path is None else [data.path])


def source_problems(sources: Sequence[Mapping[str, Any]]) -> Iterator[ConfigError]:
    """Every fault of a list of sources besides unknown keys and wrong types, one error each."""
    if not sources:
        fix = "list at least one, [{path: FILE}], or set data.path"
        yield ConfigError(f"{SOURCES} is empty", where=SOURCES, fix=fix)
    names = list(map(source_name, sources))
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        place, weight = f"{SOURCES}[{number}]", source.get("weight", 1.0)
        if source.get("path") in (None, "", "???"):
            yield ConfigError(f"{place} has no path", where=place, fix="give it path: FILE")
        elif isinstance(source.get("path"), str) and not _NAME.fullmatch(name):
            fix = "give it a name of letters, digits, dots, - and _: name: NAME"
            yield ConfigError(f"{name!r} cannot name a source", where=place, fix=fix)
        if isinstance(weight, (int, float)) and not (math.isfinite(weight) and weight > 0):
            fix = "use a number above 0, or leave the source out"
            yield ConfigError(f"{weight} is out of range", where=f"{place}.weight", fix=fix)
        limit = source.get("limit")
        if isinstance(limit, int) and limit < 1:
            fix = "use >= 1, or null for all rows"
            yield ConfigError(f"{limit} is out of range", where=f"{place}.limit", fix=fix)
    for name, count in Counter(names).items():
        if count > 1 and name:
            places = ", ".join(f"{SOURCES}[{n}]" for n, one in enumerate(names) if one == name)
            cause = f"{count} sources are called '{name}'"
            yield ConfigError(cause, where=places, fix="give each a name of its own: name: NAME")


def missing_sources(sources: Sequence[Mapping[str, Any]]) -> Iterator[LoratuneError]:
    """The local files among the sources that are not there, one error each."""
    for number, source in enumerate(sources):
        path = os.path.expanduser(str(source.get("path") or ""))
        is_file = os.path.splitext(path.lower().removesuffix(".gz"))[1] in SUFFIXES
        if not is_file or glob.has_magic(path) or path.startswith(BUILTIN):
            continue
        if not os.path.lexists(path):
            folder = os.path.dirname(path) or "."
            beside = os.listdir(folder) if os.access(folder, os.R_OK) else []
            fix = did_you_mean(os.path.basename(path), beside)
            yield DataError(f"no file '{path}'", where=f"{SOURCES}[{number}].path", fix=fix)


def by_name(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain values with the list of sources as a mapping, name to settings.

    Without where the sources lie: what they hold has a fingerprint.
    """
    data = recipe.get("data")
    listed = data.get("sources") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(listed, list):
        return dict(recipe)
    if not all(isinstance(source, Mapping) for source in listed):
        return dict(recipe)
    named = {
        source_name(source): {k: value for k, value in source.items() if k not in ("name", "path")}
        for source in listed
    }
    return {**recipe, "data": {**data, "sources": named}}


def test_rows_are_the_demos(data: DataConfig) -> bool:
    """Whether the test rows are the embedded demo's although the training rows are the user's."""
    rows = training_paths(data)
    is_own = bool(rows) and not any(path.startswith(BUILTIN) for path in rows)
    return is_own and str(data.test_path).startswith(BUILTIN)
