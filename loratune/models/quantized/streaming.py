"""A base read tensor by tensor: each is quantized, or copied, before the next one is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loratune.errors import ModelError
from loratune.models.build import empty_model
from loratune.models.quantized.choice import layers_to_quantize, sizes_of
from loratune.models.quantized.format import Quantization
from loratune.models.quantized.layers import quantized_linear, stored_linear
from loratune.models.reading import Misfits, Reader
from loratune.models.weights import TensorEntry, read_one

_STATES = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
_OF_INT8 = re.compile(r"\.(SCB|weight_format)$")


def load_quantized(
    folder: Path, dtype: torch.dtype, attention: str, quantization: Quantization
) -> tuple[Any, Misfits]:
    """A model whose linear layers are quantized while they are read, or are so in the files.

    Beyond the model itself, no more than one stored tensor is in memory.

    Args:
        folder: the model's.
        dtype: number format of everything else, and of the arithmetic.
        attention: as ``model.attention``.
        quantization: how.

    Returns:
        The model, and what of its files did not fit.

    Raises:
        ModelError: a layer that cannot be quantized so.
    """
    model: Any = empty_model(folder, dtype, attention)
    chosen = set() if quantization.in_files else set(layers_to_quantize(model, quantization))
    reader = _Reader(model, folder, dtype)
    reader.note_unexpected(reader.states())
    for name, module in list(model.named_modules()):
        if name in chosen or reader.is_quantized(f"{name}.weight"):
            model.set_submodule(name, reader.layer(name, module, quantization))
        else:
            reader.fill(name, module)
    return model, reader.misfits


class _Reader(Reader):
    """Gives the layers of one model their values."""

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype) -> None:
        super().__init__(model, folder, dtype)
        self._filled: dict[int, nn.Parameter] = {}

    def states(self) -> Iterator[str]:
        """Stored tensors that belong to a quantized weight beside them."""
        used = {stored for group in self.names.groups for stored in group.stored}
        for name in self.entries:
            if {_STATES.sub("", name), _OF_INT8.sub(".weight", name)} & used:
                yield name

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
            else self._value(f"{name}.bias", module.bias)
        )
        if quantization.in_files:
            return self._stored(name, torch.Size((out_features, in_features)), bias)
        weight = (
            self.names.read(f"{name}.weight") if self.has(f"{name}.weight", module.weight) else None
        )
        if weight is None:
            return module
        is_turned = type(module).__name__ == "Conv1D"
        oriented = weight.T if is_turned else weight
        layer: Any = quantized_linear(oriented, bias, quantization, self._dtype)
        layer.stored_input_first = is_turned
        return layer  # type: ignore[no-any-return]

    def _stored(self, name: str, shape: torch.Size, bias: Tensor | None) -> nn.Module:
        place = self.names.own(f"{name}.weight")
        assert place is not None
        return read_stored_layer(place.stored[0], self.entries, shape, bias, self._dtype)

    def fill(self, name: str, module: nn.Module) -> None:
        """Give a module its own parameters and stored buffers; tied ones stay tied."""
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = f"{name}.{key}" if name else key
            if id(parameter) not in self._filled:
                value = self._value(own, parameter)
                if value is None:
                    continue
                self._filled[id(parameter)] = nn.Parameter(value, requires_grad=False)
            module.register_parameter(key, self._filled[id(parameter)])
        self.fill_buffers(name, module)

    def _value(self, name: str, wanted: Any) -> Tensor | None:
        return self.value(name) if self.has(name, wanted) else None


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


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every quantized layer of a model, by name."""
    for name, module in model.named_modules():
        if hasattr(module, "weight_blocks") and hasattr(module, "wide_dtype"):
            yield name, module
