"""Number formats of tensors: their names in safetensors files and in torch, and their sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FORMATS = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "BOOL": ("bool", 1),
}  # fmt: skip
"""Name in safetensors files to torch's name and the bytes of one number."""
_NAMES = {torch_name: name for name, (torch_name, _) in _FORMATS.items()}
ITEM_BYTES = {name: size for name, (_, size) in _FORMATS.items()}
FLOATING = ("F64", "F32", "F16", "BF16")
COMPUTED_IN = ("F32", "F16", "BF16")
"""Formats in which a base model is loaded and merged."""


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype for a safetensors name; torch is imported only here."""
    import torch

    dtype: torch.dtype = getattr(torch, _FORMATS[name][0])
    return dtype


def safetensors_name(torch_name: str) -> str:
    """The safetensors name of ``float32``, ``bfloat16`` or another of torch's dtypes."""
    return _NAMES[torch_name]
