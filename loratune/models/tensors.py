"""Tensors that lie where they are stored: in a mapped safetensors file, never copied."""

from __future__ import annotations

import torch
from torch import Tensor

from loratune.models.dtypes import torch_dtype
from loratune.models.weights import TensorEntry, mapped


def tensor_in(entry: TensorEntry, content: memoryview) -> Tensor:
    """One tensor's value in the mapped bytes of its file."""
    dtype = torch_dtype(entry.dtype)
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(content[entry.begin : entry.end], dtype=dtype).view(entry.shape)


def read_one(entry: TensorEntry) -> Tensor:
    """One tensor's value."""
    return tensor_in(entry, mapped(entry.file))
