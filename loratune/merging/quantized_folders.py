"""A quantized base as a plain model folder, and a plain folder as a quantized one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratune import files
from loratune.adapters.kernels.blocks import weight_of
from loratune.errors import MergeError
from loratune.merging.folder import copy_side_files
from loratune.merging.safetensors_writer import SafetensorsWriter
from loratune.models.build import empty_model
from loratune.models.dtypes import FLOATING, ITEM_BYTES
from loratune.models.quantized.choice import layers_to_quantize
from loratune.models.quantized.format import Quantization, config_entry
from loratune.models.quantized.layers import quantized_linear, stored_tensors
from loratune.models.quantized.streaming import read_stored_layer
from loratune.models.stored_names import StoredGroup, StoredNames
from loratune.models.weights import SINGLE, TensorEntry, read_one, tensor_entries

_WIDE = "F32"


def write_dequantized(base_folder: Path, quantization: Quantization, target: Path) -> None:
    """Write a base with the weights that training on it quantized computes with, in fp32.

    One tensor at a time is in memory.

    Args:
        base_folder: the base model's files.
        quantization: how it is quantized, in its files or as they are read.
        target: an existing, empty folder.
    """
    wide = _Widened(base_folder, quantization)
    entries = wide.entries(target / SINGLE)
    with files.storage_errors(target), closing(SafetensorsWriter(target / SINGLE, entries)) as out:
        for entry in entries:
            value = wide.value(entry.name).contiguous()
            out.write(value.reshape(-1).view(torch.uint8).numpy().data)
    _write_config(base_folder, target, None)
    copy_side_files(base_folder, target)


class _Widened:
    """The tensors of a plain folder, read off a quantized base."""

    def __init__(self, folder: Path, quantization: Quantization) -> None:
        self._model: Any = empty_model(folder, torch.float32)
        self._stored, self._quantization = tensor_entries(folder), quantization
        self._names = StoredNames(self._model, self._stored)
        self._groups = {name: group for group in self._names.groups for name in group.stored}
        self._chosen = set(
            self._in_files()
            if quantization.in_files
            else layers_to_quantize(self._model, quantization)
        )
        self._ready: dict[str, Tensor] = {}

    def _in_files(self) -> Iterator[str]:
        for name, _ in self._model.named_modules():
            group = self._names.own(f"{name}.weight")
            if group is not None and self._stored[group.stored[0]].dtype in ("U8", "I8"):
                yield name

    def entries(self, file: Path) -> list[TensorEntry]:
        """What is written, in the order of the base's files; places count from 0."""
        entries, place = [], 0
        for name, entry in self._stored.items():
            shape = self._shape(name, entry)
            if shape is None:
                continue
            dtype = _WIDE if entry.dtype in (*FLOATING, "U8", "I8") else entry.dtype
            end = place + torch.Size(shape).numel() * ITEM_BYTES[dtype]
            entries.append(TensorEntry(name, file, dtype, shape, place, end))
            place = end
        return entries

    def _shape(self, name: str, entry: TensorEntry) -> tuple[int, ...] | None:
        """A tensor's shape when it is plain; ``None`` for what only a quantized one needs."""
        group = self._groups.get(name)
        if not self._quantization.in_files:
            return entry.shape
        if group is None:
            return None
        shape = tuple(self._model.state_dict()[group.parameters[0]].shape)
        return shape if group.parameters[0].removesuffix(".weight") in self._chosen else entry.shape

    def value(self, name: str) -> Tensor:
        """One plain tensor."""
        if name not in self._ready:
            self._ready |= self._values(name)
        return self._ready.pop(name)

    def _values(self, name: str) -> dict[str, Tensor]:
        group = self._groups.get(name)
        if group is None:
            return {name: _wide(read_one(self._stored[name]))}
        if self._quantization.in_files:
            return {name: self._from_files(name, group)}
        stored = {one: read_one(self._stored[one]) for one in group.stored}
        parameters = group.to_parameters(stored)
        changed = {one: self._rounded(one, value) for one, value in parameters.items()}
        return {one: _wide(value) for one, value in group.to_stored(changed).items()}

    def _from_files(self, name: str, group: StoredGroup) -> Tensor:
        module = group.parameters[0].removesuffix(".weight")
        if module not in self._chosen:
            return _wide(read_one(self._stored[name]))
        wanted = self._model.get_submodule(module)
        shape = torch.Size((wanted.out_features, wanted.in_features))
        return weight_of(read_stored_layer(name, self._stored, shape, None, torch.float32))

    def _rounded(self, parameter: str, value: Tensor) -> Tensor:
        """A parameter as the quantized layer multiplies with it; others as they are."""
        module, _, key = parameter.rpartition(".")
        if key != "weight" or module not in self._chosen:
            return value
        turned = type(self._model.get_submodule(module)).__name__ == "Conv1D"
        weight = value.T if turned else value
        layer = quantized_linear(weight, None, self._quantization, torch.float32)
        return weight_of(layer).T if turned else weight_of(layer)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def write_quantized(plain_folder: Path, quantization: Quantization, target: Path) -> None:
    """Write a plain model's folder with its linear layers quantized, as transformers reads it.

    Raises:
        MergeError: if a layer is stored in another form than the model has it.
        ModelError: if a layer cannot be quantized so.
    """
    model: Any = empty_model(plain_folder, torch.float32)
    entries = tensor_entries(plain_folder)
    names = StoredNames(model, entries)
    chosen = layers_to_quantize(model, quantization)
    tensors = {name: read_one(entry) for name, entry in entries.items()}
    for module in chosen:
        group = names.own(f"{module}.weight")
        if group is None or group.conversion is not None or _is_turned(model, module):
            raise MergeError(
                "this layer is stored in a form that has no quantized one",
                where=module,
                fix=f"model.quantize_skip=[{module.rpartition('.')[2]}], or leave requantize out",
            )
        stored = group.stored[0]
        layer = quantized_linear(tensors.pop(stored), None, quantization, torch.float32)
        start = stored.removesuffix("weight")
        tensors |= {f"{start}{key}": value for key, value in stored_tensors(layer).items()}
    with files.storage_errors(target):
        plain = {name: value.contiguous().clone() for name, value in tensors.items()}
        save_file(plain, target / SINGLE, metadata={"format": "pt"})
    skipped = [
        n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n not in chosen
    ]
    _write_config(plain_folder, target, config_entry(quantization, skipped))
    copy_side_files(plain_folder, target)


def _is_turned(model: Any, module: str) -> bool:
    return type(model.get_submodule(module)).__name__ == "Conv1D"


def _write_config(source: Path, target: Path, quantization: Mapping[str, Any] | None) -> None:
    config = files.read_json(source / "config.json")
    config.pop("quantization_config", None)
    if quantization is None:
        config.pop("torch_dtype", None)
        config["dtype"] = "float32"
    else:
        config["quantization_config"] = dict(quantization)
    files.write_json(target / "config.json", config)
