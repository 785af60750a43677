"""Write a safetensors file one tensor at a time, so that no more than one is ever in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from loratune.models.weights import TensorEntry


class SafetensorsWriter:
    """A file whose tensors arrive in the order of ``entries``; their places count from 0.

    Attributes:
        sha256: hex digest of the whole file, once closed.
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        self._file: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()
        self._left = [entry.size for entry in entries]
        self.sha256 = ""
        self._put(_header(entries))

    def close(self) -> None:
        """End the file."""
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


def _header(entries: Sequence[TensorEntry]) -> bytes:
    """Length and JSON header, padded with spaces so that tensors start at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
