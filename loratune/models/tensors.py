"""Tensors that lie where they are stored: in a mapped safetensors file, never copied."""

from __future__ import annotations

import torch
from torch import Tensor

from loratune.models.weights import TensorEntry, mapped

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def tensor_in(entry: TensorEntry, content: memoryview) -> Tensor:
    """One tensor's value in the mapped bytes of its file."""
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    values = torch.frombuffer(content[entry.begin : entry.end], dtype=DTYPES[entry.dtype])
    return values.view(entry.shape)


def read_one(entry: TensorEntry) -> Tensor:
    """One tensor's value."""
    return tensor_in(entry, mapped(entry.file))
