"""The parameters of a model that was built without data, until their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratune.models.reading import WHOLE, Reader


class UnreadParameters:
    """Gives the parameters of a model on the meta device their values.

    The parameters are told apart by themselves, not by name: an adapter around a layer renames
    them, and leaves them what they are.  Values are on the CPU.

    Attributes:
        device: where the model is to be.
    """

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Note every parameter's name; the model is plain, with tokens added or not."""
        self.device = device
        self._reader = Reader(model, folder, dtype)
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters()
        }
        self._starts: dict[Tensor, Tensor] = {}

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._names

    def named(self, name: str) -> Tensor:
        """The value of the parameter with a name of the plain model."""
        return self._reader.value(name)

    def trained_copy(self, parameter: Tensor) -> nn.Parameter:
        """An fp32 copy without data that trains; it begins with the parameter's own value."""
        copy = nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))
        if parameter in self._names:
            self._names[copy] = self._names[parameter]
        return copy

    def begin_with(self, copy: Tensor, start: Tensor) -> None:
        """Let a trained copy begin with other values: a saved adapter's."""
        self._starts[copy] = start

    def read(self, parameter: Tensor, rows: slice = WHOLE) -> Tensor:
        """A parameter's value, or some rows of it; rows of added tokens are the others' mean."""
        if parameter in self._starts:
            start = self._starts[parameter]
            return (start if rows == WHOLE else start[rows]).to(parameter.dtype, copy=True)
        name, words = self._names[parameter], parameter.shape[0] if parameter.dim() else 1
        value = self._reader.value(name, rows)
        added = words - len(value) if rows == WHOLE and value.dim() else 0
        if added:
            mean = value.float().mean(0).to(value.dtype)
            value = torch.cat([value, mean.expand(added, *mean.shape)])
        return value
