"""What to say when a pattern names no layer that can be adapted."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from loratune.adapters.config import LayerShape
from loratune.errors import ModelError
from loratune.models.architectures import STACKED_EXPERTS

_NUMBERED = re.compile(r"^.*\.\d+\.")
_MOST_NAMES = 12


def unmatched(
    pattern: str,
    shapes: Sequence[LayerShape],
    *,
    is_expression: bool = False,
    where: str = "targets.modules",
) -> ModelError:
    """A pattern that matches no module, with the closest names that exist."""
    group = _group_members(pattern, shapes)
    if group:
        cause = f"'{pattern}' is a group of modules, not a layer"
        return ModelError(cause, where=where, fix=f"name its layers: {', '.join(group)}")
    close = closest(pattern, shapes)
    fix = f"the closest layers are {', '.join(close)}" if close else _everything(shapes)
    if is_expression and re.fullmatch(r"[\w.]+", pattern):
        fix = f"a string is a regular expression over whole names; for names use [{pattern}]; {fix}"
    return ModelError(f"'{pattern}' matches no layer of the model", where=where, fix=fix)


def unsupported(pattern: str, named: Sequence[str], others: Mapping[str, str]) -> ModelError:
    """A pattern that names modules of a type, or tensors, that cannot be adapted."""
    first, more = named[0], f" and {len(named) - 1} more" if len(named) > 1 else ""
    is_tensor = others[first] == STACKED_EXPERTS
    kind = others[first] if is_tensor else f"of type {others[first]}"
    return ModelError(
        f"'{pattern}' names {first}{more}, {kind}, which cannot be adapted",
        where="targets.modules",
        fix="adapt Linear, Conv1D or Embedding layers; train others in full with "
        "targets.modules_to_save",
    )


def left_out(pattern: str, named: Sequence[str]) -> ModelError:
    """A pattern all of whose layers are excluded again."""
    return ModelError(
        f"'{pattern}' names {len(named)} layers, and targets.exclude, targets.modules_to_save or "
        "targets.layers leaves every one of them out",
        where="targets.modules",
        fix="remove the pattern, or the exclusion",
    )


def no_roles(word: str, family: str | None, shapes: Sequence[LayerShape]) -> ModelError:
    """A role word for a model whose roles nobody wrote down."""
    return ModelError(
        f"what '{word}' means for a model of type '{family}' is not known",
        where="targets.modules",
        fix=f"use all_linear or a list of names; {_everything(shapes)}",
    )


def no_experts(shapes: Sequence[LayerShape]) -> ModelError:
    """The word for experts, for a model that has none or keeps them in another form."""
    return ModelError(
        "the model has no experts that are stacked in one tensor of three dimensions",
        where="targets.modules",
        fix=f"use all_linear or a list of names; {_everything(shapes)}",
    )


def closest(pattern: str, shapes: Sequence[LayerShape]) -> list[str]:
    """Up to three existing names like ``pattern``, nearest first, with shapes and how many."""
    labels = _labels(shapes)
    tails: dict[str, list[str]] = {}
    for label, name in labels.items():
        tails.setdefault(name.rpartition(".")[2], []).append(label)
    wanted = pattern.rpartition(".")[2]
    near = difflib.get_close_matches(wanted, tails, n=3, cutoff=0.5)
    return [label for tail in near for label in tails[tail]]


def _labels(shapes: Sequence[LayerShape]) -> dict[str, str]:
    """``fc1 (768 → 3072, 12 layers)`` to ``fc1``."""
    counted = Counter(
        (_NUMBERED.sub("", shape.name), shape.in_features, shape.out_features) for shape in shapes
    )
    labels = {}
    for (name, in_features, out_features), count in counted.items():
        layers = f"{count} layers" if count > 1 else "1 layer"
        labels[f"{name} ({in_features} → {out_features}, {layers})"] = name
    return labels


def _everything(shapes: Sequence[LayerShape]) -> str:
    labels = list(_labels(shapes))
    more = f" and {len(labels) - _MOST_NAMES} more" if len(labels) > _MOST_NAMES else ""
    return f"the model has {', '.join(labels[:_MOST_NAMES])}{more}"


def _group_members(pattern: str, shapes: Sequence[LayerShape]) -> list[str]:
    inside = (
        shape.name.partition(f".{pattern}.")[2] for shape in shapes if f".{pattern}." in shape.name
    )
    return list(dict.fromkeys(name for name in inside if name))
