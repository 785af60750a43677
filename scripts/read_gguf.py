"""Read a GGUF file: its settings, and its tensors dequantised to fp32.

The format (version 3): magic, version, counts, key-values, tensor infos, then aligned data.  A
tensor's first dimension is the fastest, so that shapes are reversed here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_WEIGHTS_A_BLOCK = 32


class GGUFFile:
    """A GGUF file in memory.

    Attributes:
        settings: key to value, as the file names them.
        shapes: name of every tensor to its shape, slowest dimension first.
    """

    def __init__(self, path: Path) -> None:
        self._bytes, self._place = path.read_bytes(), 0
        if self._bytes[:4] != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
        self._place = 4
        version, tensors, settings = (self._number(kind) for kind in "IQQ")
        if version != 3:
            raise ValueError(f"{path} is GGUF version {version}; version 3 can be read")
        self.settings: dict[str, Any] = {}
        for _ in range(settings):
            key = self._text()
            self.settings[key] = self._value(self._number("I"))
        infos = [self._tensor_info() for _ in range(tensors)]
        self.shapes = {name: shape for name, shape, _, _ in infos}
        self._stored = {name: (kind, offset) for name, _, kind, offset in infos}
        alignment = self.settings.get("general.alignment", 32)
        self._start = -(-self._place // alignment) * alignment

    def tensor(self, name: str) -> Array:
        """A tensor's values in fp32."""
        kind, offset = self._stored[name]
        if kind not in _KINDS:
            raise ValueError(f"{name} is of type {kind}; {sorted(_KINDS)} can be read")
        block_bytes, weights, dequantise = _KINDS[kind]
        shape = self.shapes[name]
        blocks = int(np.prod(shape)) // weights
        raw = np.frombuffer(
            self._bytes, np.uint8, blocks * block_bytes, self._start + offset
        ).reshape(blocks, block_bytes)
        return dequantise(raw).reshape(shape)

    def _number(self, kind: str) -> Any:
        [value] = struct.unpack_from(f"<{kind}", self._bytes, self._place)
        self._place += struct.calcsize(f"<{kind}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        self._place += length
        return self._bytes[self._place - length : self._place].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            item, count = self._number("I"), self._number("Q")
            return [self._value(item) for _ in range(count)]
        return self._number(_NUMBERS[kind])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        shape = tuple(self._number("Q") for _ in range(self._number("I")))
        return name, shape[::-1], self._number("I"), self._number("Q")


def _plain(raw: Array) -> Array:
    return raw.view("<f4").astype(np.float32)


def _q4_1(raw: Array) -> Array:
    """32 weights of 4 bits, d·q + m: half d, half m, 16 bytes with weight n below weight n + 16."""
    scale, least = (raw[:, a : a + 2].copy().view("<f2").astype(np.float32) for a in (0, 2))
    quants = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return scale * quants.astype(np.float32) + least


def _q8_0(raw: Array) -> Array:
    """32 weights of 8 bits, d·q: half d, then the signed bytes."""
    scale = raw[:, :2].copy().view("<f2").astype(np.float32)
    return scale * raw[:, 2:].copy().view(np.int8).astype(np.float32)


_KINDS: dict[int, tuple[int, int, Callable[[Array], Array]]] = {
    0: (4, 1, _plain),
    3: (20, _WEIGHTS_A_BLOCK, _q4_1),
    8: (34, _WEIGHTS_A_BLOCK, _q8_0),
}
"""Number of a type to bytes and weights of a block, and what makes fp32 of it."""
