"""The values of a model's parameters, read from its files one at a time, whole or some rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratune.models.stored_names import StoredGroup, StoredNames
from loratune.models.weights import TensorEntry, read_one, tensor_entries

WHOLE = slice(None)


@dataclass
class Misfits:
    """What of a model's files does not fit the model.

    Attributes:
        missing: parameters that no tensor becomes.
        mismatched: name, stored shape, wanted shape.
        unexpected: tensors that the model has no place for.
    """

    missing: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def as_loading_info(self) -> dict[str, Any]:
        """The same as transformers tells it."""
        return {
            "missing_keys": self.missing,
            "mismatched_keys": self.mismatched,
            "unexpected_keys": self.unexpected,
        }


class Reader:
    """Reads the parameters of one model from its files.

    Beyond what it returns, no more than one stored tensor, or the tensors that one conversion of
    transformers takes, are in memory.

    Attributes:
        names: what the files call the model's parameters.
        entries: the tensors of the files.
        misfits: what did not fit so far.
    """

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        """Read the headers of a folder's files.

        Args:
            model: with or without data, and not yet wrapped.
            folder: the model's.
            dtype: number format of the values.

        Raises:
            LoratuneError: missing or broken files.
        """
        self.entries: Mapping[str, TensorEntry] = tensor_entries(folder)
        self.names = StoredNames(model, self.entries)
        self.misfits = Misfits()
        self._model, self._dtype = model, dtype
        self._converted: tuple[StoredGroup, dict[str, Tensor]] | None = None

    def value(self, name: str, rows: slice = WHOLE) -> Tensor:
        """A parameter's value in the format in which the model has it, copied out of its file.

        Args:
            name: the parameter's.
            rows: those along the first dimension that are wanted.  Of a tensor that is stored as
                it is, no others are read; what transformers converts is read whole.

        Raises:
            ModelError: if the files do not hold it.
        """
        wanted = self._stored_value(name)
        rows = rows if wanted.dim() else WHOLE
        part = wanted if rows == WHOLE else wanted[rows]
        return part.to(self._dtype_of(name), copy=True).contiguous()

    def _stored_value(self, name: str) -> Tensor:
        """A parameter as the files have it; a plain one lies where it is, and nothing is read."""
        place = self.names.stored_as(name)
        if place is None or len(place[1].parameters) == 1:
            self._converted = None
            return self.names.read(name)
        name, group = place
        if self._converted is None or self._converted[0] is not group:
            stored = {one: read_one(self.entries[one]) for one in group.stored}
            self._converted = group, group.to_parameters(stored)
        return self._converted[1][name]

    def has(self, name: str, wanted: Any) -> bool:
        """Whether the files hold a parameter in the right shape; if not, that is noted."""
        place = self.names.stored_as(name)
        if place is None:
            self.misfits.missing.append(name)
            return False
        group = place[1]
        stored = self.entries[group.stored[0]].shape
        if group.conversion is None and stored != tuple(wanted.shape):
            self.misfits.mismatched.append((name, stored, tuple(wanted.shape)))
            return False
        return True

    def note_unexpected(self, own: Iterable[str]) -> None:
        """Note stored tensors that the model has no place for; ``own`` are none of them."""
        used = {stored for group in self.names.groups for stored in group.stored} | set(own)
        ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self.misfits.unexpected = [
            name
            for name in self.entries
            if name not in used and not any(re.search(pattern, name) for pattern in ignored)
        ]

    def fill_buffers(self, name: str, module: nn.Module) -> None:
        """Give a module its own buffers, as far as they are stored."""
        for key, buffer in module.named_buffers(recurse=False):
            own = f"{name}.{key}" if name else key
            if self.names.own(own) is not None:
                buffer.copy_(self.names.read(own))

    def _dtype_of(self, name: str) -> torch.dtype:
        """What transformers loads a parameter in: a few modules stay in fp32."""
        model, half = self._model, self._dtype is not torch.float32
        wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if half else set()
        if self._dtype is torch.float16:
            wide |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        return torch.float32 if any(_is_part(one, name) for one in wide) else self._dtype


def _is_part(wanted: str, name: str) -> bool:
    return re.search(rf"(^|\.){re.escape(wanted)}(\.|$)", name) is not None
