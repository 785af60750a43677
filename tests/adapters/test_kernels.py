"""The fused adapter layers against the readable formulas and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loratune.adapters.kernels import fused_lora_linear, fused_vera_linear
from loratune.adapters.kernels.dropout import Dropout

SHAPES = [(7, 5), (2, 3, 5), (0, 5), (1, 5)]
IN, OUT, RANK = 5, 6, 3


def draw(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None or not x.numel():
        return x
    flat = x.detach().reshape(-1, x.shape[-1])
    mask = torch.cat([keep for _, keep in dropout.masks(flat)])
    return x * mask.view(x.shape) * dropout.scale


def base(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)


def lora_reference(x, weight, bias, A, B, scaling, dropout, transposed):  # type: ignore[no-untyped-def]
    delta = F.linear(F.linear(dropped(x, dropout), A), B)
    return base(x, weight, bias, transposed) + delta * scaling


def vera_reference(x, weight, bias, A, B, d, b, scaling, dropout, transposed):  # type: ignore[no-untyped-def]
    v = F.linear(d * F.linear(dropped(x, dropout), A), B)
    return base(x, weight, bias, transposed) + scaling * b * v


def assert_same_gradients(
    actual: Tensor, expected: Tensor, inputs: list[Tensor], tol: float
) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(actual, inputs, upstream)
    want = torch.autograd.grad(expected, inputs, upstream)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tol, atol=tol)


def next_dropout(p: float) -> Dropout | None:
    """The mask that the next fused call will draw."""
    state = torch.get_rng_state()
    dropout = Dropout.draw(p)
    torch.set_rng_state(state)
    return dropout


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fused_lora_equals_autograd_of_the_formula(shape, transposed, has_bias, p):  # type: ignore[no-untyped-def]
    x, A, B = draw(*shape), draw(RANK, IN), draw(OUT, RANK)
    weight = draw(*((IN, OUT) if transposed else (OUT, IN)), grad=False)
    bias = draw(OUT, grad=False) if has_bias else None
    dropout = next_dropout(p)
    actual = fused_lora_linear(x, weight, bias, A, B, 1.7, p, transposed)
    expected = lora_reference(x, weight, bias, A, B, 1.7, dropout, transposed)
    assert_same_gradients(actual, expected, [x, A, B], 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fused_vera_equals_autograd_of_the_formula(shape, transposed, has_bias, p):  # type: ignore[no-untyped-def]
    x, d, b = draw(*shape), draw(RANK), draw(OUT)
    A, B = draw(RANK, IN + 2, grad=False)[:, :IN], draw(OUT + 1, RANK, grad=False)[:OUT]
    weight = draw(*((IN, OUT) if transposed else (OUT, IN)), grad=False)
    bias = draw(OUT, grad=False) if has_bias else None
    dropout = next_dropout(p)
    actual = fused_vera_linear(x, weight, bias, A, B, d, b, 0.6, p, transposed)
    expected = vera_reference(x, weight, bias, A, B, d, b, 0.6, dropout, transposed)
    assert_same_gradients(actual, expected, [x, d, b], 1e-12)


@pytest.mark.parametrize("needs", [n for n in itertools.product([0, 1], repeat=3) if any(n)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_part_of_a_lora_layer_can_be_frozen(needs, p):  # type: ignore[no-untyped-def]
    x, A, B = draw(7, IN), draw(RANK, IN), draw(OUT, RANK)
    weight = draw(OUT, IN, grad=False)
    for tensor, need in zip((x, A, B), needs, strict=True):
        tensor.requires_grad_(bool(need))
    inputs = [t for t in (x, A, B) if t.requires_grad]
    dropout = next_dropout(p)
    actual = fused_lora_linear(x, weight, None, A, B, 2.0, p)
    assert_same_gradients(
        actual, lora_reference(x, weight, None, A, B, 2.0, dropout, False), inputs, 1e-12
    )
