"""A GGUF file of somebody else, checked before an adapter is run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from loratune.adapter_files.offline import MetaAdapter
from loratune.errors import ModelError
from loratune.gguf_files.architectures import architecture_of
from loratune.gguf_files.tensors import TensorNames

ROUNDING = 0.4
"""Root mean square difference of a weight from the base's, relative to it, that quantizing to a few
bits leaves; weights of another model are 1.4 apart."""


def read_gguf(path: Path) -> GGUFReader:
    """A GGUF file's keys and tensors, mapped.

    Raises:
        ModelError: if it is not a GGUF file, or not a whole one.
    """
    try:
        size = path.stat().st_size
        reader = GGUFReader(path)
        last = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    except OSError as error:
        raise ModelError(f"cannot read: {error.strerror or error}", where=str(path)) from error
    except Exception as error:  # the reader fails on a cut file in whatever way it happens to
        raise _broken("not a GGUF file, or not a whole one", path) from error
    if last > size:
        raise _broken(f"truncated: {size:,} bytes where {last:,} are needed", path)
    return reader


def _broken(cause: str, path: Path) -> ModelError:
    return ModelError(cause, where=str(path), fix="copy or download it again")


def check_base(path: Path, offline: MetaAdapter, tokens: list[str]) -> None:
    """Check that a GGUF file holds the adapter's base, quantized or not.

    Its architecture, its vocabulary, the shape of every adapted weight, and the values of one.

    Args:
        path: the file.
        offline: the adapter on its base's names and shapes.
        tokens: of the base's tokenizer.

    Raises:
        ModelError: naming what is another model's.
    """
    reader, config = read_gguf(path), offline.config
    architecture = architecture_of(config, str(offline.base_folder))
    for key, expected in (
        ("general.type", "model"), ("general.architecture", architecture.name),
    ):  # fmt: skip
        got = value_of(reader, key)
        if got != expected and not (got is None and key == "general.type"):
            raise _another(f"its {key} is '{got}', the adapter's base needs '{expected}'", path)
    names = TensorNames(config, architecture, str(path))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for layer in offline.wrapped.adapters.values():
        _check_shape(names.name(layer.shape.parameter), tuple(layer.weight.shape), stored, path)
    if _words(value_of(reader, "tokenizer.ggml.tokens")) != _words(tokens):
        raise _another("its tokenizer has other tokens", path)
    _check_values(offline, names, stored, path)


def value_of(reader: GGUFReader, key: str) -> Any:
    """The value of a key, or ``None``."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _words(tokens: list[str] | None) -> list[str]:
    """Tokens without those that only fill up rows."""
    filled = tokens or []
    return [token for number, token in enumerate(filled) if token != f"[PAD{number}]"]


def _check_shape(
    name: str, shape: tuple[int, ...], stored: dict[str, ReaderTensor], path: Path
) -> None:
    if name not in stored:
        raise _another(f"it has no tensor '{name}'", path)
    got = tuple(int(n) for n in reversed(stored[name].shape))
    if got != shape:
        raise _another(f"its '{name}' is {list(got)}, the base's {list(shape)}", path)


def _check_values(
    offline: MetaAdapter, names: TensorNames, stored: dict[str, ReaderTensor], path: Path
) -> None:
    """One adapted weight against the base's."""
    parameter = next(iter(offline.wrapped.adapters.values())).shape.parameter
    name = names.name(parameter)
    expected = names.value(parameter, offline.names.read(parameter).float())
    tensor = stored[name]
    try:
        numbers = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        return  # a format that only llama.cpp reads: its answers tell
    got = torch.from_numpy(np.ascontiguousarray(numbers))
    difference = float((got.reshape(expected.shape) - expected).norm() / expected.norm())
    if not difference <= ROUNDING:
        raise _another(f"its '{name}' differs by {difference:.0%} of the base's", path)


def _another(what: str, path: Path) -> ModelError:
    return ModelError(
        f"this is not the adapter's base: {what}",
        where=str(path),
        fix="gguf.base=FILE of the model that the adapter was trained on",
    )
