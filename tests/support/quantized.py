"""Tiny bases in 4 and 8 bits, and the same in bitsandbytes' own layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.config.schema import Quantize
from loratune.models.load import load_model
from loratune.models.quantized.format import Quantization
from support.tiny_models import save_base, tiny_llama

bnb = pytest.importorskip("bitsandbytes", reason="needs loratune[quantized]")

KINDS = {
    "nf4": Quantization(Quantize.nf4),
    "nf4 double": Quantization(Quantize.nf4, double=True),
    "fp4": Quantization(Quantize.fp4),
    "int8": Quantization(Quantize.int8),
}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
ABOUT_ITSELF = [
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*:UserWarning"),
]


def wide_base(folder: Path, **changes: Any) -> Path:
    """A tiny model's folder whose widths 64 divides."""
    return save_base(folder, tiny_llama(**(WIDTHS | changes)))


def quantized_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, dtype, quantization=KINDS[kind])


def with_plain_layers(model: Any) -> Any:
    """A copy with bitsandbytes' own classes in the place of ours, as PEFT is used to."""
    theirs = copy.deepcopy(model)
    for name, layer in list(theirs.named_modules()):
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            theirs.set_submodule(name, _plain(layer))
    is_4bit = any(isinstance(one, bnb.nn.Linear4bit) for one in theirs.modules())
    theirs.is_loaded_in_4bit, theirs.is_loaded_in_8bit = is_4bit, not is_4bit
    return theirs


def _plain(layer: Any) -> nn.Module:
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    if isinstance(layer, bnb.nn.Linear4bit):
        plain = bnb.nn.Linear4bit(*sizes, compute_dtype=layer.compute_dtype, device="meta")
        plain.weight, plain.quant_state = layer.weight, layer.quant_state
    else:
        plain = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        plain.weight = layer.weight
    plain.bias = layer.bias
    return plain


def dequantized(layer: Any) -> Tensor:
    """The weight as bitsandbytes itself widens it."""
    if isinstance(layer, bnb.nn.Linear4bit):
        wide: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return wide
    return layer.weight.CB.float() * layer.weight.SCB.unsqueeze(1).mul(1.0 / 127.0)
