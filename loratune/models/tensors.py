"""Tensors that lie where they are stored: in a mapped safetensors file, never copied."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.models.dtypes import FLOATING, torch_dtype
from loratune.models.weights import TensorEntry, mapped, read_header


def tensor_in(entry: TensorEntry, content: memoryview) -> Tensor:
    """One tensor's value in the mapped bytes of its file."""
    dtype = torch_dtype(entry.dtype)
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(content[entry.begin : entry.end], dtype=dtype).view(entry.shape)


def read_one(entry: TensorEntry) -> Tensor:
    """One tensor's value."""
    return tensor_in(entry, mapped(entry.file))


def read_all(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name.

    Raises:
        ModelError: if it is missing or broken.
    """
    entries = read_header(file)
    content = mapped(file)
    return {name: tensor_in(entries[name], content) for name in sorted(entries)}


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, in one quick pass: both reach the extremes."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def check_stored(entry: TensorEntry, content: memoryview) -> None:
    """Check that a stored weight holds numbers only.

    Args:
        entry: the tensor.
        content: the mapped bytes of its file.

    Raises:
        ModelError: naming it, how many of its numbers are not finite, and the first one's place.
    """
    if entry.dtype not in FLOATING:
        return
    tensor = tensor_in(entry, content)
    if is_finite(tensor):
        return
    bad = ~torch.isfinite(tensor)
    first = [int(place) for place in bad.nonzero()[0]]
    raise ModelError(
        f"{int(bad.sum()):,} of {tensor.numel():,} numbers of '{entry.name}' are NaN or infinite, "
        f"the first at {first}",
        where=str(entry.file),
        fix="copy or download it again; a base that holds such numbers cannot be trained or merged",
    )
