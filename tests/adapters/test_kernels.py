"""The fused adapter layers against the readable formulas and autograd."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from loratune.adapters.kernels.dropout import Dropout
from loratune.adapters.kernels.linear import dense_pays
from loratune.adapters.kernels.lora import fused_lora_linear
from loratune.adapters.kernels.shared_input import SharedProducts
from loratune.adapters.kernels.vera import fused_vera_linear
from loratune.errors import ModelError

SHAPES = [(7, 5), (2, 3, 5), (0, 5), (1, 5)]
IN, OUT, RANK = 5, 6, 3


def draw(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None or not x.numel():
        return x
    flat = x.detach().reshape(-1, x.shape[-1])
    mask = torch.cat([keep.clone() for _, keep in dropout.masks(flat)])
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


@pytest.mark.parametrize("rows", [1, 40, 4000])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_order_of_the_products_gives_the_same_result(
    rows: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[bool] = []

    def record(*sizes: int) -> bool:
        formed.append(dense_pays(*sizes))
        return formed[-1]

    monkeypatch.setattr("loratune.adapters.kernels.linear.dense_pays", record)
    x, weight = draw(rows, IN), draw(*((IN, OUT) if transposed else (OUT, IN)), grad=False)
    A, B, d, b = draw(RANK, IN), draw(OUT, RANK), draw(RANK), draw(OUT)
    actual = fused_lora_linear(x, weight, None, A, B, 0.5, 0.0, transposed)
    expected = lora_reference(x, weight, None, A, B, 0.5, None, transposed)
    assert_same_gradients(actual, expected, [x, A, B], 1e-11)
    A.requires_grad_(False)
    B.requires_grad_(False)
    actual = fused_vera_linear(x, weight, None, A, B, d, b, 0.5, 0.0, transposed)
    expected = vera_reference(x, weight, None, A, B, d, b, 0.5, None, transposed)
    assert_same_gradients(actual, expected, [x, d, b], 1e-11)
    # LoRA forwards and backwards, then VeRA: many tokens pay for W + ΔW, VeRA's backward first.
    assert formed == {1: [False] * 4, 40: [False] * 3 + [True], 4000: [True] * 4}[rows]


def test_half_precision_never_forms_the_summed_weight() -> None:
    # The base product cancels exactly, so that y is the correction alone; in bf16 1 + 1e-4 is 1.
    half = torch.randn(4000, 2).bfloat16()
    x, weight = torch.cat([half, -half], dim=1), torch.ones(OUT, 4).bfloat16()
    A, B = torch.randn(RANK, 4), torch.randn(OUT, RANK) * 1e-4
    y = fused_lora_linear(x, weight, None, A, B, 1.0).double()
    exact = x.double() @ (B.double() @ A.double()).t()
    assert (y - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["lora", "vera"])
def test_half_precision_base_with_fp32_adapter_is_right_to_one_percent(
    dtype: torch.dtype, p: float, variant: str
) -> None:
    torch.manual_seed(0)
    n, i, o, r = 64, 48, 56, 8
    x, weight = draw(n, i, dtype=dtype), draw(o, i, dtype=dtype, grad=False)
    A, B = draw(r, i, dtype=torch.float32), draw(o, r, dtype=torch.float32)
    d, b = draw(r, dtype=torch.float32), draw(o, dtype=torch.float32)
    lora = variant == "lora"
    trained = [A, B] if lora else [d, b]
    for frozen in [d, b] if lora else [A, B]:
        frozen.requires_grad_(False)
    dropout = next_dropout(p)
    if lora:
        y = fused_lora_linear(x, weight, None, A, B, 0.25, p)
    else:
        y = fused_vera_linear(x, weight, None, A, B, d, b, 0.25, p)
    upstream = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, [x, *trained], upstream)]
    wide = [t.detach().double().requires_grad_() for t in (x, *trained)]
    if lora:
        exact = lora_reference(wide[0], weight.double(), None, *wide[1:], 0.25, dropout, False)
    else:
        factors = (A.double(), B.double(), *wide[1:])
        exact = vera_reference(wide[0], weight.double(), None, *factors, 0.25, dropout, False)
    want = [exact, *torch.autograd.grad(exact, wide, upstream.double())]
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() / other.norm() < 1e-2


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_computes_in_its_dtype_and_keeps_the_gradients_dtypes(p: float) -> None:
    torch.manual_seed(0)
    x, weight = draw(9, IN, dtype=torch.float32), draw(OUT, IN, dtype=torch.float32, grad=False)
    A, B = draw(RANK, IN, dtype=torch.float32), draw(OUT, RANK, dtype=torch.float32)
    dropout = next_dropout(p)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused_lora_linear(x, weight, None, A, B, 1.0, p)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), [x, A, B])
    exact = lora_reference(x, weight, None, A, B, 1.0, dropout, False)
    for one, other in zip(grads, torch.autograd.grad(exact.sum(), [x, A, B]), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 2e-2


def small_stack(p: float) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    weight, A, B = draw(IN, IN, grad=False), draw(RANK, IN), draw(IN, RANK)
    d, b, VA, VB = draw(RANK), draw(IN), draw(RANK, IN, grad=False), draw(IN, RANK, grad=False)

    def run(x: Tensor) -> Tensor:
        y = torch.tanh(fused_lora_linear(x, weight, None, A, B, 0.5, p))
        return fused_vera_linear(y, weight, None, VA, VB, d, b, 0.5, p).pow(2)

    return [A, B, d, b], run


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, p: float) -> None:
    parameters, run = small_stack(p)
    x = draw(6, IN)
    torch.manual_seed(3)
    plain = run(x)
    expected = torch.autograd.grad(plain.sum(), [x, *parameters])
    torch.manual_seed(3)
    again = checkpoint(run, x, use_reentrant=reentrant)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    again.sum().backward()
    for tensor, want in zip([x, *parameters], expected, strict=True):
        torch.testing.assert_close(tensor.grad, want, rtol=0, atol=0)


def test_strided_inputs_and_gradients_are_welcome() -> None:
    x, weight = draw(IN, 4, 3).permute(2, 1, 0), draw(OUT, IN, grad=False)
    A, B = draw(RANK, IN), draw(OUT, RANK)
    y = fused_lora_linear(x, weight, None, A, B, 1.0)
    expected = lora_reference(x, weight, None, A, B, 1.0, None, False)
    # sum() sends an expanded gradient, the transposition a strided one.
    for reduce in (Tensor.sum, lambda t: (t.transpose(0, 1) @ torch.ones(OUT, 2).double()).sum()):
        got = torch.autograd.grad(reduce(y), [A, B], retain_graph=True)
        want = torch.autograd.grad(reduce(expected), [A, B], retain_graph=True)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    x, weight, A, B = draw(4, IN), draw(OUT, IN, grad=False), draw(RANK, IN), draw(OUT, RANK)
    y = fused_lora_linear(x, weight, None, A, B, 1.0)
    weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_base_layer_that_trains_is_refused() -> None:
    with pytest.raises(ModelError, match="base layer"):
        fused_lora_linear(draw(4, IN), draw(OUT, IN), None, draw(RANK, IN), draw(OUT, RANK), 1.0)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x, weight, A, B = draw(4, IN), draw(OUT, IN, grad=False), draw(RANK, IN), draw(OUT, RANK)
    y = fused_lora_linear(x, weight, None, A, B, 1.0)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("p", [0.1, 0.5, 1e-9, 1 - 1e-9])
def test_dropout_keeps_each_element_with_probability_one_minus_p(p: float) -> None:
    like = torch.empty(701, 301)
    dropout = Dropout(p, seed=11)
    keep = torch.cat([mask.clone() for _, mask in dropout.masks(like)])
    assert keep.shape == like.shape
    assert set(keep.unique().tolist()) <= {0.0, 1.0}
    deviation = 5 * (p * (1 - p) / keep.numel()) ** 0.5 + 2**-16
    assert abs(keep.mean().item() - (1 - p)) < deviation
    # Neighbours, which share 64 random bits, and rows are independent.
    for shifted in (keep.roll(1, 1), keep.roll(1, 0)):
        assert abs((keep * shifted).mean().item() - (1 - p) ** 2) < 2 * deviation


def test_the_mask_follows_torchs_seed_and_differs_from_call_to_call() -> None:
    x, weight, A, B = draw(4, IN), draw(OUT, IN, grad=False), draw(RANK, IN), draw(OUT, RANK)

    def two_calls() -> list[Tensor]:
        torch.manual_seed(5)
        return [fused_lora_linear(x, weight, None, A, B, 1.0, 0.5) for _ in range(2)]

    (first, second), (again, _) = two_calls(), two_calls()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_no_dropout_draws_no_random_number() -> None:
    x, weight, A, B = draw(4, IN), draw(OUT, IN, grad=False), draw(RANK, IN), draw(OUT, RANK)
    before = torch.get_rng_state()
    fused_lora_linear(x, weight, None, A, B, 1.0, 0.0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("change", ["nothing", "input", "factor", "other factor"])
def test_a_shared_product_is_used_only_while_it_is_true(change: str) -> None:
    x, weight, A, B = (draw(*s, grad=False) for s in ((4, IN), (OUT, IN), (RANK, IN), (OUT, RANK)))
    d, b = draw(RANK), draw(OUT)
    products = SharedProducts()
    fused_vera_linear(x, weight, None, A, B, d, b, products=products)
    if change == "input":
        x.mul_(2)
    elif change == "factor":
        A.mul_(2)
    elif change == "other factor":
        A = A.clone() * 2
    known = products.recall(x, A, torch.float64)
    assert (known is not None) == (change == "nothing")
    actual = fused_vera_linear(x, weight, None, A, B, d, b, products=products)
    expected = vera_reference(x, weight, None, A, B, d, b, 1.0, None, False)
    assert_same_gradients(actual, expected, [d, b], 1e-12)


def test_a_shared_product_dies_with_its_input() -> None:
    x, weight, A, B = (draw(*s, grad=False) for s in ((4, IN), (OUT, IN), (RANK, IN), (OUT, RANK)))
    products = SharedProducts()
    y = fused_vera_linear(x, weight, None, A, B, draw(RANK), draw(OUT), products=products)
    product = weakref.ref(products.recall(x, A, torch.float64))
    assert product() is not None
    del x, y
    assert product() is None


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_may_change_a_layers_output_in_place(shape: tuple[int, ...]) -> None:
    x, weight, A, B = draw(*shape), draw(OUT, IN, grad=False), draw(RANK, IN), draw(OUT, RANK)
    d, b = draw(RANK), draw(OUT)
    lora = fused_lora_linear(x, weight, None, A, B, 0.5)
    vera = fused_vera_linear(x, weight, None, A.detach(), B.detach(), d, b, 0.5)
    expected = lora_reference(x, weight, None, A, B, 0.5, None, False) * 2 + 1
    assert_same_gradients(lora.mul_(2).add_(1), expected, [x, A, B], 1e-10)
    expected = vera_reference(x, weight, None, A.detach(), B.detach(), d, b, 0.5, None, False)
    assert_same_gradients(vera.mul_(2).add_(1), expected * 2 + 1, [x, d, b], 1e-10)
