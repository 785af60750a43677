"""Tensors of a safetensors file, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from loratune.weights import TensorEntry, mapped, read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def file_fingerprint(path: Path) -> str:
    """What ``fingerprint.tensors_fingerprint`` gives for the file's tensors, without loading it.

    Raises:
        ModelError: if it is no safetensors file.
    """
    digest = hashlib.sha256()
    entries = read_header(path)
    with mapped(path) as content:
        for name in sorted(entries):
            entry = entries[name]
            dtype = DTYPES.get(entry.dtype, entry.dtype)
            digest.update(f"{name} {dtype} {list(entry.shape)}\n".encode())
            with content[entry.begin : entry.end] as view:
                digest.update(view)
    return digest.hexdigest()


def unfit_names(path: Path) -> list[str]:
    """Names of tensors that are empty, NaN or infinite.

    Raises:
        ModelError: if it is no safetensors file.
    """
    entries = read_header(path)
    return [name for name, tensor in each(entries) if not _is_fit(tensor)]


def _is_fit(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (
        not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
    )


def each(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every floating tensor, one in memory at a time."""
    with ExitStack() as stack:
        contents: dict[Path, memoryview] = {}
        for name, entry in entries.items():
            if entry.file not in contents:
                contents[entry.file] = stack.enter_context(mapped(entry.file))
            if entry.dtype in DTYPES:
                yield name, read(entry, contents[entry.file])


def read(entry: TensorEntry, content: memoryview) -> Tensor:
    """One tensor's value, copied out of the mapped file."""
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    with content[entry.begin : entry.end] as view:
        values = torch.frombuffer(bytearray(view), dtype=DTYPES[entry.dtype])
    return values.view(entry.shape)


def read_one(entry: TensorEntry) -> Tensor:
    """One tensor's value."""
    with mapped(entry.file) as content:
        return read(entry, content)
