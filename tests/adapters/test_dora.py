"""What is special about DoRA: norms, two kinds of gradient, a start that is exactly the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.peft_oracle import our_model
from support.tiny_models import FAMILIES, tiny_gpt2, tiny_llama, tiny_opt
from torch import Tensor, nn

from adapters.test_saved_bytes import (
    MODELS,
    RANK,
    TOKENS,
    distinct_inputs,
    frozen_base,
    saved_bytes,
    wrapped,
)
from loratune.adapters.config import Kernel
from loratune.adapters.dora.module import DoRA
from loratune.adapters.kernels.output_norms import output_norms
from loratune.merging.weight import merged_weight

IDS = torch.arange(12).reshape(2, 6)


def random_layer(module: nn.Module, **settings: Any) -> DoRA:
    """One adapter whose trained numbers are all random."""
    layer = our_model(nn.Sequential(module), "dora", ["0"], rank=3, **settings).adapters["0"]
    assert isinstance(layer, DoRA)
    torch.manual_seed(1)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter, std=0.5)
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 2.0)
    return layer


def by_the_paper(layer: DoRA, weight: Tensor, A: Tensor, B: Tensor, *, detached: bool) -> Tensor:
    """m ⊙ V/‖V‖ in fp64 (equation 5), with the norm a constant or not; (out, in)."""
    V = weight.double() + layer.scaling * B @ A
    norm = V.norm(dim=1, keepdim=True)
    magnitude = layer.lora_magnitude_vector.double()[:, None]
    result: Tensor = magnitude * V / (norm.detach() if detached else norm)
    return result


@pytest.mark.parametrize("kernel", ["reference", "fused"])
@pytest.mark.parametrize("exact", [False, True])
def test_outputs_and_gradients_are_the_papers_in_fp64(kernel: str, exact: bool) -> None:
    torch.manual_seed(0)
    layer = random_layer(nn.Linear(7, 5), alpha=2.0, kernel=kernel, exact_gradient=exact)
    x, upstream = torch.randn(11, 7), torch.randn(11, 5)
    layer(x).backward(upstream)
    A = layer.lora_A.detach().double().requires_grad_()
    B = layer.lora_B.detach().double().requires_grad_()
    weight = by_the_paper(layer, layer.weight, A, B, detached=not exact)
    y = x.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), y, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(y, [A, B, layer.lora_magnitude_vector], upstream.double())
    for got, expected in zip((layer.lora_A, layer.lora_B), wanted[:2], strict=True):
        torch.testing.assert_close(got.grad.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.lora_magnitude_vector.grad, wanted[2], atol=1e-5, rtol=1e-5)


def test_the_two_gradients_differ_where_the_norm_moves() -> None:
    gradients = []
    for exact in (False, True):
        torch.manual_seed(0)
        layer = random_layer(nn.Linear(7, 5), exact_gradient=exact)
        layer(torch.randn(11, 7)).sum().backward()
        gradients.append(layer.lora_B.grad.clone())
    # What the norm adds is what keeps the gradient orthogonal to V: nothing is left along it.
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("input_first", [False, True])
def test_norms_and_their_gradients_equal_autograds_of_the_whole_matrix(
    input_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loratune.adapters.kernels.output_norms.CPU_BLOCK", 20)
    monkeypatch.setattr("loratune.adapters.kernels.output_norms.FEWEST_COLUMNS", 3)
    weight = torch.randn(8, 7, dtype=torch.float64)
    A, B = torch.randn(2, 7).double().requires_grad_(), torch.randn(8, 2).double().requires_grad_()
    stored = weight.T.contiguous() if input_first else weight
    got = output_norms(stored, A, B, 0.7, input_first=input_first)
    expected = (weight + 0.7 * B @ A).norm(dim=1)
    torch.testing.assert_close(got, expected, atol=1e-14, rtol=1e-14)
    upstream = torch.randn(8).double()
    for one, other in zip(
        torch.autograd.grad(got, [A, B], upstream),
        torch.autograd.grad(expected, [A, B], upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-13)


def test_norms_survive_a_correction_that_nearly_cancels_the_weight() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 64), torch.randn(8, 2)
    weight = -(B @ A) + 1e-4 * torch.randn(8, 64)
    exact = (weight.double() + B.double() @ A.double()).norm(dim=1)
    got = output_norms(weight, A, B, 1.0, input_first=False)
    # The sum of three squares would be off by as much as the norm itself.
    torch.testing.assert_close(got.double(), exact, atol=0, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_its_merge_proves_itself_in_every_dtype(
    build: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = our_model(build().to(dtype), "dora", "all-linear")
    for adapter in model.adapters.values():
        assert isinstance(adapter, DoRA)
        nn.init.normal_(adapter.lora_B, std=0.1)
        weight = adapter.weight.detach().clone()
        merged, proof = merged_weight(weight, [adapter], dtype)
        assert proof.probe_error < 1e-5
        oriented = weight if adapter.shape.kind == "linear" else weight.T
        A, B = adapter.lora_A.double(), adapter.lora_B.double()
        expected = by_the_paper(adapter, oriented, A, B, detached=True)
        expected = expected if adapter.shape.kind == "linear" else expected.T
        torch.testing.assert_close(merged, expected.to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_correction_is_exactly_zero(family: str) -> None:
    model = our_model(FAMILIES[family](tied=False), "dora", "all-linear")
    assert not any(bool(adapter.delta_weight().any()) for adapter in model.adapters.values())


def test_an_output_without_weights_stays_at_zero_and_can_train() -> None:
    base = nn.Linear(4, 3)
    nn.init.zeros_(base.weight[1:2].detach())
    for kernel in ("reference", "fused"):
        layer = our_model(nn.Sequential(base), "dora", ["0"], rank=2, kernel=kernel).adapters["0"]
        x = torch.randn(5, 4)
        y = layer(x)
        torch.testing.assert_close(y, base(x))
        y.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.requires_grad)


def test_evaluation_follows_every_change_of_the_factors() -> None:
    layer = random_layer(nn.Linear(7, 5), kernel="fused").eval()
    x = torch.randn(3, 7)
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        layer.load_adapter_tensors({k: 2 * t for k, t in layer.adapter_tensors().items()})
        after = layer(x)
        layer.config.kernel = Kernel.reference
        torch.testing.assert_close(after, layer(x))
    assert float((after - before).abs().max()) > 1e-2


def test_the_norms_are_in_fp32_over_a_half_precision_base() -> None:
    layer = our_model(nn.Sequential(nn.Linear(64, 8).bfloat16()), "dora", ["0"]).adapters["0"]
    assert isinstance(layer, DoRA)
    exact = layer.weight.double().norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector.double(), exact, atol=1e-6, rtol=1e-6)
    # A gain that is less than one rounding of bf16 for each weight still moves the mean output.
    layer.config.kernel = Kernel.fused
    x = torch.randn(512, 64).bfloat16()
    with torch.no_grad():
        before = layer(x).double()
        layer.lora_magnitude_vector.mul_(1 + 2**-10)
        after = layer(x).double()
    ratio = (after * before).sum() / before.square().sum()
    assert 1 + 2**-12 < ratio < 1 + 2**-8


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_it_keeps_rank_numbers_and_one_output_per_token_and_layer(
    name: str, dtype: torch.dtype, exact: bool
) -> None:
    model = wrapped(name, "dora", dtype, exact_gradient=exact)
    numbers = sum(RANK + adapter.out_features for adapter in model.adapters.values())
    per_output = 4 * sum(2 * adapter.out_features for adapter in model.adapters.values())
    extra = saved_bytes(model.model) - saved_bytes(frozen_base(name, dtype))
    inputs = {id(t): t.untyped_storage().nbytes() for t in distinct_inputs(model).values()}
    kept = numbers * TOKENS * dtype.itemsize
    # The inputs uncopied, as LoRA keeps them, and per output the norm and the gain, in fp32.
    assert kept <= extra <= kept + sum(inputs.values()) + per_output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_layer_keeps_less_than_the_reference(dtype: torch.dtype) -> None:
    fused = saved_bytes(wrapped("opt", "dora", dtype).model)
    assert fused < saved_bytes(wrapped("opt", "dora", dtype, kernel=Kernel.reference).model)


def test_a_step_forms_no_matrix_of_the_weights_size() -> None:
    """Nothing that autograd keeps is as large as W: the norms come block by block."""
    model = our_model(
        nn.Sequential(nn.Linear(512, 512)), "dora", ["0"], rank=2, kernel="fused"
    ).model
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(3, 512))
    weights = [size for size in kept if size == 512 * 512]
    assert len(weights) == 1 and max(kept) == 512 * 512  # the frozen weight itself


def test_an_embedding_has_a_magnitude_for_every_column() -> None:
    wrapped_model = our_model(tiny_opt(), "dora", ["embed_tokens"], rank=2, kernel="fused")
    wrapped_model.model(IDS, labels=IDS).loss.backward()
    (layer,) = wrapped_model.adapters.values()
    assert isinstance(layer, DoRA)
    assert layer.lora_magnitude_vector.shape == (layer.out_features,)
    assert bool(layer.lora_magnitude_vector.grad.any())
