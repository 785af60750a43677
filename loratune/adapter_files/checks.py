"""What an adapter file may not hold, and how it may not differ from the model it is put into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from loratune.errors import LoratuneError, ModelError
from loratune.models.weights import is_finite

LISTED = 64
"""Names in one message: every tensor of a small adapter, never a screenful of a large one."""


def unfit_tensors(tensors: Mapping[str, Tensor], where: str) -> list[LoratuneError]:
    """What no adapter may hold: nothing at all, and empty, non-floating or non-finite tensors."""
    if not tensors:
        return [ModelError("the adapter holds no tensor", where=where, fix="train it again")]
    kinds: dict[str, list[str]] = {
        "empty": [],
        "no floating-point numbers": [],
        "NaN or infinite": [],
    }
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            kinds["empty"].append(name)
        elif not tensor.is_floating_point():
            kinds["no floating-point numbers"].append(name)
        elif not is_finite(tensor):
            kinds["NaN or infinite"].append(name)
    return [
        ModelError(
            f"{_counted(names)} {kind}", where=where, fix="train it again, or restore the file"
        )
        for kind, names in kinds.items()
        if names
    ]


def _counted(names: Sequence[str]) -> str:
    """``tensor 'a' is``, or ``3 tensors ('a', 'b', 'c') are``; a very long list is cut."""
    if len(names) == 1:
        return f"tensor '{names[0]}' is"
    listed = ", ".join(f"'{name}'" for name in sorted(names, key=_natural)[:LISTED])
    return f"{len(names)} tensors ({listed}{', ...' if len(names) > LISTED else ''}) are"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def misfits(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], optional: set[str], where: str
) -> list[LoratuneError]:
    """One error each for what is missing, unexpected and misshapen."""
    misshapen = [
        f"{key} (is {list(given[key].shape)}, must be {list(expected[key].shape)})"
        for key in sorted(expected.keys() & given.keys())
        if expected[key].shape != given[key].shape
    ]
    kinds = {
        "missing": sorted(expected.keys() - given.keys() - optional),
        "unexpected": sorted(given.keys() - expected.keys()),
        "misshapen": misshapen,
    }
    return [
        ModelError(f"{_counted(names)} {kind}", where=where, fix=_OTHER_FILE)
        for kind, names in kinds.items()
        if names
    ]


_OTHER_FILE = "use the adapter's own file, configuration and base model"
