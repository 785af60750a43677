"""The parameters of a model that was built without data, until their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._names

    def named(self, name: str) -> Tensor:
        """The value of the parameter with a name of the plain model."""
        return self._reader.value(name)

    def read(self, parameter: Tensor, rows: slice = WHOLE) -> Tensor:
        """A parameter's value, or some rows of it; rows of added tokens are the others' mean."""
        name, words = self._names[parameter], parameter.shape[0] if parameter.dim() else 1
        value = self._reader.value(name, rows)
        added = words - len(value) if rows == WHOLE and value.dim() else 0
        if added:
            mean = value.float().mean(0).to(value.dtype)
            value = torch.cat([value, mean.expand(added, *mean.shape)])
        return value
