"""bitsandbytes' own layers of a model that another library loaded, made ours in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def adopt_layers(model: nn.Module) -> None:
    """Give every layer of bitsandbytes in a model the products that training here relies on.

    The numbers stay where they are; only the class changes.
    """
    foreign = [one for one in model.modules() if type(one).__module__ == "bitsandbytes.nn.modules"]
    if not foreign:
        return
    # Needs the library, which is there: the layers are its own.
    from loratune.models.quantized.layers import Linear4Bit, Linear8Bit, bnb

    for layer in foreign:
        if isinstance(layer, bnb.nn.Linear4bit):
            _become(layer, Linear4Bit, layer.compute_dtype)
        elif isinstance(layer, bnb.nn.Linear8bitLt) and not layer.state.has_fp16_weights:
            if layer.weight.SCB is None:  # its first product moved them
                layer.weight.CB, layer.weight.SCB = layer.state.CB, layer.state.SCB
            _become(layer, Linear8Bit, None)


def _become(layer: Any, kind: type[nn.Linear], dtype: torch.dtype | None) -> None:
    layer.__class__ = kind
    layer.wide_dtype = dtype or torch.float32
