"""Write a safetensors file one tensor at a time, so that no more than one is ever in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written: its name, safetensors dtype, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


class SafetensorsWriter:
    """A file whose tensors arrive in the order of ``plans``.

    Attributes:
        sha256: hex digest of the whole file, once closed.
    """

    def __init__(
        self, path: Path, plans: Sequence[TensorPlan], metadata: Mapping[str, str]
    ) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._left = [plan.size for plan in plans]
        self.sha256 = ""
        self._put(_header(plans, metadata))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()
        self.sha256 = self._digest.hexdigest()

    def write(self, content: memoryview) -> None:
        """Append the next tensor's bytes.

        Raises:
            ValueError: if they are not as many as planned.
        """
        expected = self._left.pop(0)
        if content.nbytes != expected:
            raise ValueError(f"{content.nbytes} bytes instead of {expected}")
        self._put(content)

    def _put(self, content: bytes | memoryview) -> None:
        self._digest.update(content)
        self._file.write(content)


def _header(plans: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded with spaces so that tensors start at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for plan in plans:
        end = offset + plan.size
        header[plan.name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
