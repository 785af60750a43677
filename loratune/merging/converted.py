"""Stored tensors that hold parameters in another form: merged as parameters, written as stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loratune.adapters.base import Adapter
from loratune.errors import MergeError
from loratune.merging.weight import (
    ModuleProof,
    merged_weight,
    prove_weight,
    replaced_weight,
)
from loratune.models.stored_names import StoredGroup

ReadStored = Callable[[str], Tensor]
"""Gives a stored tensor by its name in the files."""


@dataclass
class ConvertedTensors:
    """Tensors that transformers fuses, splits or permutes on loading, some parameters changed.

    They are merged together and handed out one by one: until the last one is written, those of
    this group stay in memory.

    Attributes:
        group: the stored tensors and the parameters made of them.
        layers: parameter name to the corrections added to it.
        trained: parameter name to its value, for modules trained in full.
    """

    group: StoredGroup
    layers: dict[str, list[Adapter]] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _ready: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def merged(
        self, name: str, read: ReadStored, dtype: torch.dtype
    ) -> tuple[Tensor, list[ModuleProof]]:
        """One merged tensor in its stored form; the proofs come with the first one asked for.

        Args:
            name: of the tensor in the files.
            read: gives the base's tensors.
            dtype: of the result.

        Raises:
            MergeError: if a proof fails, or the form stored cannot be restored to the bit.
        """
        with self._lock:
            proofs: list[ModuleProof] = []
            if name not in self._ready:
                self._ready, proofs = self._merge(read, dtype)
            return self._ready.pop(name), proofs

    def _merge(
        self, read: ReadStored, dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], list[ModuleProof]]:
        stored = {name: read(name) for name in self.group.stored}
        parameters = self.group.to_parameters(stored)
        _require_equal(stored, self.group.to_stored(parameters))
        results: dict[str, Tensor] = {}
        proofs: list[ModuleProof] = []
        for name, value in parameters.items():
            if name in self.trained:
                trained = self.trained[name].reshape(value.shape)
                results[name], proved = replaced_weight(value, trained, dtype, name)
                proofs += proved
            elif name in self.layers:
                results[name], proof = merged_weight(value, self.layers[name], dtype)
                proofs.append(proof)
            else:
                results[name] = value.to(dtype)
        written = {
            name: value.contiguous() for name, value in self.group.to_stored(results).items()
        }
        _require_equal(results, self.group.to_parameters(written))
        return written, proofs

    def is_merged(self, base: ReadStored, merged: ReadStored) -> bool:
        """Whether the tensors of a merged model are base + corrections, within one rounding."""
        before = self.group.to_parameters({name: base(name) for name in self.group.stored})
        after = self.group.to_parameters({name: merged(name) for name in self.group.stored})
        return all(self._is_merged(name, before[name], value) for name, value in after.items())

    def _is_merged(self, name: str, base: Tensor, merged: Tensor) -> bool:
        if name in self.trained:
            return torch.equal(self.trained[name].reshape(merged.shape).to(merged.dtype), merged)
        if name not in self.layers:
            return torch.equal(base.to(merged.dtype), merged)
        return is_proved(base, self.layers[name], merged)


def is_proved(base: Tensor, layers: Sequence[Adapter], merged: Tensor) -> bool:
    """Whether a merged weight is base + corrections, within one rounding."""
    try:
        prove_weight(base, layers, merged)
    except MergeError:
        return False
    return True


def _require_equal(values: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        if not torch.equal(again[name], value):
            raise MergeError(
                "what transformers does to this tensor on loading cannot be undone to the bit",
                where=name,
                fix="leave the layer out with targets.exclude",
            )
