"""A base read tensor by tensor: each is quantized, or copied, before the next one is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratune.errors import ModelError
from loratune.models.build import empty_model
from loratune.models.quantized.choice import layers_to_quantize, sizes_of
from loratune.models.quantized.format import Quantization
from loratune.models.quantized.layers import quantized_linear, stored_linear
from loratune.models.stored_names import StoredNames
from loratune.models.weights import TensorEntry, read_one, tensor_entries

_STATES = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
_OF_INT8 = re.compile(r"\.(SCB|weight_format)$")


@dataclass
class Loaded:
    """A model, and what of its files did not fit.

    Attributes:
        model: the model.
        missing: parameters that no tensor becomes.
        mismatched: name, stored shape, wanted shape.
        unexpected: tensors that the model has no place for.
    """

    model: Any
    missing: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_quantized(
    folder: Path, dtype: torch.dtype, attention: str, quantization: Quantization
) -> Loaded:
    """A model whose linear layers are quantized while they are read, or are so in the files.

    Beyond the model itself, no more than one stored tensor is in memory.

    Args:
        folder: the model's.
        dtype: number format of everything else, and of the arithmetic.
        attention: as ``model.attention``.
        quantization: how.

    Raises:
        ModelError: a layer that cannot be quantized so.
    """
    model: Any = empty_model(folder, dtype, attention)
    entries = tensor_entries(folder)
    names = StoredNames(model, entries)
    chosen = set() if quantization.in_files else set(layers_to_quantize(model, quantization))
    loaded = Loaded(model, unexpected=_unexpected(model, names, entries))
    reader = _Reader(names, entries, dtype, loaded)
    for name, module in list(model.named_modules()):
        if name in chosen or reader.is_quantized(f"{name}.weight"):
            model.set_submodule(name, reader.layer(name, module, quantization))
        else:
            reader.fill(name, module)
    return loaded


def _unexpected(model: Any, names: StoredNames, entries: Mapping[str, TensorEntry]) -> list[str]:
    """Stored tensors that the model has no place for."""
    used = {stored for group in names.groups for stored in group.stored}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return [
        name
        for name in entries
        if name not in used
        and _STATES.sub("", name) not in used
        and _OF_INT8.sub(".weight", name) not in used
        and not any(re.search(pattern, name) for pattern in ignored)
    ]


@dataclass
class _Reader:
    """Gives the layers of one model their values."""

    names: StoredNames
    entries: Mapping[str, TensorEntry]
    dtype: torch.dtype
    loaded: Loaded
    filled: dict[int, nn.Parameter] = field(default_factory=dict)

    def is_quantized(self, parameter: str) -> bool:
        """Whether the files hold the parameter in 4 or 8 bits."""
        place = self.names.own(parameter)
        return place is not None and self.entries[place.stored[0]].dtype in ("U8", "I8")

    def layer(self, name: str, module: nn.Module, quantization: Quantization) -> nn.Module:
        """The quantized layer in the place of an empty one, or that one where it has no values."""
        out_features, in_features = sizes_of(module) or (0, 0)
        bias = (
            None
            if getattr(module, "bias", None) is None
            else self.value(f"{name}.bias", module.bias)
        )
        if quantization.in_files:
            return self._stored(name, torch.Size((out_features, in_features)), bias)
        weight = (
            self.names.read(f"{name}.weight")
            if self._has(f"{name}.weight", module.weight)
            else None
        )
        if weight is None:
            return module
        is_turned = type(module).__name__ == "Conv1D"
        oriented = weight.T if is_turned else weight
        layer: Any = quantized_linear(oriented, bias, quantization, self.dtype)
        layer.stored_input_first = is_turned
        return layer  # type: ignore[no-any-return]

    def _stored(self, name: str, shape: torch.Size, bias: Tensor | None) -> nn.Module:
        place = self.names.own(f"{name}.weight")
        assert place is not None
        return read_stored_layer(place.stored[0], self.entries, shape, bias, self.dtype)

    def fill(self, name: str, module: nn.Module) -> None:
        """Give a module its own parameters and stored buffers; tied ones stay tied."""
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = f"{name}.{key}" if name else key
            if id(parameter) not in self.filled:
                value = self.value(own, parameter)
                if value is None:
                    continue
                self.filled[id(parameter)] = nn.Parameter(value, requires_grad=False)
            module.register_parameter(key, self.filled[id(parameter)])
        for key, buffer in module.named_buffers(recurse=False):
            own = f"{name}.{key}" if name else key
            if self.names.own(own) is not None:
                buffer.copy_(self.names.read(own))

    def value(self, name: str, wanted: Any) -> Tensor | None:
        """A parameter's value, copied out of its file."""
        if not self._has(name, wanted):
            return None
        return self.names.read(name).to(self._dtype_of(name), copy=True).contiguous()

    def _has(self, name: str, wanted: Any) -> bool:
        """Whether the files hold a parameter in the right shape; if not, that is noted."""
        place = self.names.stored_as(name)
        if place is None:
            self.loaded.missing.append(name)
            return False
        group = place[1]
        stored = self.entries[group.stored[0]].shape
        if group.conversion is None and stored != tuple(wanted.shape):
            self.loaded.mismatched.append((name, stored, tuple(wanted.shape)))
            return False
        return True

    def _dtype_of(self, name: str) -> torch.dtype:
        """What transformers loads a parameter in: a few modules stay in fp32."""
        model, half = self.loaded.model, self.dtype is not torch.float32
        wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if half else set()
        if self.dtype is torch.float16:
            wide |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        return torch.float32 if any(_is_part(one, name) for one in wide) else self.dtype


def read_stored_layer(
    weight: str,
    entries: Mapping[str, TensorEntry],
    shape: torch.Size,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> nn.Linear:
    """A layer that is quantized in the files.

    Args:
        weight: its weight's name there.
        entries: the tensors of the files.
        shape: (out, in).
        bias: (out) or ``None``.
        dtype: number format that the widened weight has by default.

    Raises:
        ModelError: if what belongs to the weight is not all there.
    """
    start = weight.removesuffix("weight")
    own = {
        stored.removeprefix(start): read_one(entry)
        for stored, entry in entries.items()
        if stored.startswith(start) and stored != f"{start}bias"
    }
    try:
        return stored_linear(own, shape, bias, dtype)
    except (KeyError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(
            f"'{weight}' is not as bitsandbytes writes a quantized layer: {error}",
            where=str(entries[weight].file),
            fix="copy or download it again",
        ) from error


def _is_part(wanted: str, name: str) -> bool:
    return re.search(rf"(^|\.){re.escape(wanted)}(\.|$)", name) is not None


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every quantized layer of a model, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "weight_blocks") and hasattr(module, "wide_dtype"):
            yield name, module
