"""Tensors of a safetensors file, one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from loratune.models.dtypes import FLOATING, torch_dtype
from loratune.models.tensors import is_finite, tensor_in
from loratune.models.weights import TensorEntry, mapped, read_header


def file_fingerprint(path: Path) -> str:
    """What ``fingerprint.tensors_fingerprint`` gives for the file's tensors, without loading it.

    Raises:
        ModelError: if it is not a safetensors file.
    """
    digest = hashlib.sha256()
    entries = read_header(path)
    content = mapped(path)
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name} {torch_dtype(entry.dtype)} {list(entry.shape)}\n".encode())
        digest.update(content[entry.begin : entry.end])
    return digest.hexdigest()


def unfit_names(path: Path) -> list[str]:
    """Names of tensors that are empty, NaN or infinite.

    Raises:
        ModelError: if it is not a safetensors file.
    """
    entries = read_header(path)
    return [name for name, tensor in each(entries) if not _is_fit(tensor)]


def _is_fit(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and is_finite(tensor)


def each(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every floating tensor, read as they are asked for."""
    contents: dict[Path, memoryview] = {}
    for name, entry in entries.items():
        if entry.file not in contents:
            contents[entry.file] = mapped(entry.file)
        if entry.dtype in FLOATING:
            yield name, tensor_in(entry, contents[entry.file])
