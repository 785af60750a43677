"""Layers in 4 and 8 bits hold bitsandbytes' own numbers, and multiply with what they widen to."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from support.quantized import KINDS, bnb, dequantized
from torch import Tensor

from loratune.adapters.kernels.blocks import blocks_of, weight_of
from loratune.models.quantized import layers
from loratune.models.quantized.layers import quantized_linear, stored_linear, stored_tensors

OUT, IN = 96, 128
kinds = pytest.mark.parametrize("kind", KINDS)


def weight(seed: int = 0) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def build(kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    values = torch.linspace(-1, 1, OUT) if bias else None
    return quantized_linear(weight(), values, KINDS[kind], dtype)


def theirs(kind: str) -> Any:
    """The layer that bitsandbytes makes of the same weight, whole and at once."""
    quantization = KINDS[kind]
    if not quantization.is_4bit:
        layer = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            IN, OUT, bias=False, quant_type=str(quantization.kind),
            compress_statistics=quantization.double,
        )  # fmt: skip
    layer.load_state_dict({"weight": weight()})
    return layer.to("cpu")


@kinds
@pytest.mark.parametrize("block", [IN, 5 * IN, 1 << 20])
def test_the_numbers_are_bitsandbytes_own_however_many_rows_are_taken_at_a_time(
    kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stored_tensors(theirs(kind))
    monkeypatch.setattr(layers, "QUANTIZED_AT_ONCE", block)
    monkeypatch.setattr(layers, "CPU_BLOCK", block)
    monkeypatch.setattr(layers, "FEWEST_ROWS", 1)
    layer = build(kind, bias=False)
    got = stored_tensors(layer)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert torch.equal(weight_of(layer), dequantized(layer))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_widened_weight(
    kind: str, dtype: torch.dtype
) -> None:
    layer = build(kind)
    wide = torch.nn.Linear(IN, OUT).to(dtype)
    with torch.no_grad():
        wide.weight.copy_(weight_of(layer, dtype))
        wide.bias.copy_(layer.bias)
    x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for module in (layer, wide):
        own = x.clone().requires_grad_()
        y = module(own)
        y.square().sum().backward()
        results.append((y, own.grad))
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1}
    )
    for got, expected in zip(*results, strict=True):
        assert got is not None and got.dtype is dtype
        torch.testing.assert_close(got, expected, **tolerance)


@kinds
def test_training_and_evaluation_compute_the_same_bits(kind: str) -> None:
    layer, x = build(kind), torch.randn(4, IN)
    trained = layer.train()(x.requires_grad_()).detach()
    with torch.inference_mode():
        assert torch.equal(layer.eval()(x), trained)


@kinds
def test_autograd_keeps_neither_the_input_nor_a_widened_weight(kind: str) -> None:
    layer, kept = build(kind), []
    inner = torch.randn(4, IN, requires_grad=True) * 2
    size, alive = inner.numel(), weakref.ref(inner)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(inner)
    del inner
    assert alive() is None
    assert all(tensor.numel() < size for tensor in kept)
    y.sum().backward()


@kinds
def test_what_is_stored_is_read_back_to_the_bit(kind: str) -> None:
    layer = build(kind)
    again = stored_linear(stored_tensors(layer), torch.Size((OUT, IN)), layer.bias, torch.float32)
    assert torch.equal(weight_of(again), weight_of(layer))
    assert blocks_of(copy.deepcopy(again)) is not None


@kinds
def test_the_bytes_are_those_that_are_counted_beforehand(kind: str) -> None:
    tensors = stored_tensors(build(kind, bias=False))
    described = ("quant_map", "quant_state", "weight_format")  # not in every layer's own memory
    held = {
        n: t.nbytes
        for n, t in tensors.items()
        if not n.startswith(tuple(f"weight.{d}" for d in described)) and n not in described
    }
    offset = 4 if KINDS[kind].double else 0
    assert sum(held.values()) + offset == KINDS[kind].bytes_of(OUT, IN)
