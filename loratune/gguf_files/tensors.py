"""Parameters of transformers under llama.cpp's names, in llama.cpp's order of rows."""

from __future__ import annotations

from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, get_tensor_name_map
from torch import Tensor

from loratune.errors import ModelError
from loratune.gguf_files.architectures import Architecture

ROPE_FACTORS = "rope_freqs.weight"
_SUFFIXES = (".weight", ".bias")
_ROTATED = {MODEL_TENSOR.ATTN_Q: "num_attention_heads", MODEL_TENSOR.ATTN_K: "num_key_value_heads"}
"""Projections whose outputs are rotated, and the setting that counts their heads."""


class TensorNames:
    """Names and values of a model's tensors in a GGUF file."""

    def __init__(self, config: Any, architecture: Architecture, where: str) -> None:
        arch = next(one for one, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._map = get_tensor_name_map(MODEL_ARCH(arch), config.num_hidden_layers)
        self._config, self._architecture, self._where = config, architecture, where

    def name(self, parameter: str) -> str:
        """What llama.cpp calls a parameter.

        Raises:
            ModelError: if its graph has no such tensor.
        """
        found = self._map.get_name(parameter, _SUFFIXES)
        if found is None:
            raise ModelError(
                f"llama.cpp's '{self._architecture.name}' has no tensor for '{parameter}'",
                where=self._where,
                fix="leave the layer out with targets.exclude, or export format=merged",
            )
        return found

    def value(self, parameter: str, value: Tensor) -> Tensor:
        """A parameter's value as llama.cpp multiplies with it."""
        if value.dim() == 1 and "norm" in parameter:
            return value + self._architecture.norm_offset
        return self.rows(parameter, value)

    def rows(self, parameter: str, value: Tensor) -> Tensor:
        """The rows (outputs) of a projection in llama.cpp's order.

        Args:
            parameter: the projection's weight or bias, or the weight whose ΔW has these rows.
            value: (out,) or (out, n).
        """
        kind = self._map.get_type(parameter, _SUFFIXES)
        if not self._architecture.interleaved or kind not in _ROTATED:
            return value
        heads = getattr(self._config, _ROTATED[kind])
        half = value.shape[0] // heads // 2
        return value.reshape(heads, 2, half, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
