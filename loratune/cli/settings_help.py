"""What settings mean, read from the docstrings below their fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from loratune.config.schema import RunConfig
from loratune.config.settings import listed_dataclass


def field_docs(cls: type) -> dict[str, str]:
    """Field to the text below it, for the fields that ``cls`` itself declares."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return docs


def own_settings(config: type[RunConfig]) -> str:
    """Lines about the settings that a command adds to a recipe's; empty where it adds none."""
    if config is RunConfig:
        return ""
    docs = field_docs(config)
    pairs = [
        (f"{field.name}={_default(field)}", docs.get(field.name, ""))
        for field in dataclasses.fields(config)
        if field.name in inspect.get_annotations(config)
    ]
    width = max((len(word) for word, _ in pairs), default=0)
    return "\n".join(f"  {word:<{width}}  {text}".rstrip() for word, text in pairs)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING or value == MISSING:
        return ""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def all_settings(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of every setting of a recipe; a variant's own are not among them."""
    import typing

    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        inner = hints[field.name]
        if field.name == "adapter":
            yield f"{prefix}adapter.*", "", "The variant's settings; see below."
        elif dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from all_settings(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", _default(field), docs.get(field.name, "")
            if item := listed_dataclass(inner):
                yield from all_settings(item, f"{prefix}{field.name}[].")
