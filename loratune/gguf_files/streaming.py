"""A GGUF file written one tensor at a time, so that no more than one is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFWriter
from numpy import dtype
from torch import Tensor

from loratune import files
from loratune.gguf_files.numbers import encoded, stored_bytes


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        name: llama.cpp's.
        shape: in torch's order.
        kind: number format in the file.
        value: gives it in fp32.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    value: Callable[[], Tensor]


def write_tensors(writer: GGUFWriter, path: Path, tensors: Iterable[PlannedTensor]) -> None:
    """Write the keys that ``writer`` has, and the tensors after them.

    Raises:
        MergeError: if a number is too large for its format.
        StorageError: if the disk refuses.
    """
    planned = list(tensors)
    for one in planned:
        size = stored_bytes(one.shape, one.kind)
        writer.add_tensor_info(one.name, one.shape, dtype("float32"), size, one.kind)
    with files.storage_errors(path), closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in planned:
            writer.write_tensor_data(encoded(one.value(), one.kind, one.name))
