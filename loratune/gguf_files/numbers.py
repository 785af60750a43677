"""Number formats of a GGUF file."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor

from loratune.config.schema import GgufDtype
from loratune.errors import MergeError
from loratune.models.weights import is_finite

FILE_TYPES = {
    GgufDtype.f32: LlamaFileType.ALL_F32,
    GgufDtype.f16: LlamaFileType.MOSTLY_F16,
    GgufDtype.bf16: LlamaFileType.MOSTLY_BF16,
    GgufDtype.q8_0: LlamaFileType.MOSTLY_Q8_0,
}
_TYPES = {
    GgufDtype.f32: GGMLQuantizationType.F32,
    GgufDtype.f16: GGMLQuantizationType.F16,
    GgufDtype.bf16: GGMLQuantizationType.BF16,
    GgufDtype.q8_0: GGMLQuantizationType.Q8_0,
}


def stored_type(shape: tuple[int, ...], dtype: GgufDtype) -> GGMLQuantizationType:
    """The number format of one tensor.

    Vectors stay in fp32: llama.cpp adds and multiplies with them as they are.  Rows that are no
    multiple of a block are stored in f16.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = _TYPES[dtype]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def stored_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encoded(value: Tensor, kind: GGMLQuantizationType, name: str) -> NDArray[np.generic]:
    """A tensor's numbers as they are stored.

    Args:
        value: in fp32.
        kind: number format.
        name: of the tensor, for the error.

    Raises:
        MergeError: if a number is too large for the format.
    """
    value = value.detach().contiguous()
    if kind is GGMLQuantizationType.F16:
        half = value.to(torch.float16)
        if not is_finite(half):
            raise MergeError(
                "a number is too large for f16", where=name, fix="gguf.dtype=bf16 or gguf.dtype=f32"
            )
        return half.numpy()
    if kind is GGMLQuantizationType.BF16:
        return value.to(torch.bfloat16).view(torch.int16).numpy()
    stored: NDArray[np.generic] = quantize(value.float().numpy(), kind)
    return stored
