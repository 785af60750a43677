"""A weight is merged and proved in blocks: the blocks together are the whole, and none escapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bases.tiny_base import tiny_config
from support.families import gemma3
from support.tiny_models import tiny_gpt2, tiny_opt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loratune.adapters.base import Adapter
from loratune.adapters.registry import config_class
from loratune.config.schema import TargetsConfig
from loratune.errors import MergeError
from loratune.merging import weight as merging
from loratune.merging.weight import merged_weight, prove_weight
from loratune.surgery import wrap_model


def bart() -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config("bart")
    config.scale_embedding = True
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def adapter_of(model: nn.Module, target: str, variant: str = "lora") -> Adapter:
    """The first adapter on ``target``, its trained tensors random."""
    wrapped = wrap_model(model, config_class(variant)(rank=3), TargetsConfig(modules=[target]))
    torch.manual_seed(1)
    for parameter in wrapped.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    wrapped.model.eval()
    return next(iter(wrapped.adapters.values()))


LAYERS = {
    "linear": lambda: adapter_of(tiny_opt(), "fc1"),
    "linear, vera": lambda: adapter_of(tiny_opt(), "fc1", "vera"),
    "conv1d": lambda: adapter_of(tiny_gpt2(), "c_attn"),
    "embedding": lambda: adapter_of(tiny_opt(), "embed_tokens"),
    "embedding, scaled": lambda: adapter_of(gemma3(), "embed_tokens"),
    "embedding, scaled by a plain number": lambda: adapter_of(bart(), "embed_tokens"),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "BLOCK", 100)  # not a multiple of any row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS)
def test_blocks_together_are_the_whole_weight(layer: str, dtype: torch.dtype) -> None:
    adapter = LAYERS[layer]()
    weight = adapter.weight.detach().to(dtype)
    merged, proof = merged_weight(weight, [adapter], dtype)
    delta = adapter.delta_weight().detach()
    expected = (weight.double() + delta.double()).to(dtype)
    torch.testing.assert_close(merged, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert proof.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    error = (merged.double() - weight.double() - delta.double()).norm() / delta.double().norm()
    assert proof.residual == pytest.approx(float(error), rel=0.02, abs=1e-7)
    assert proof.probe_error < 1e-5
    assert prove_weight(weight, [adapter], merged) == proof


@pytest.mark.parametrize("variant", ["lora", "dora", "full"])
def test_the_constant_of_an_embedding_needs_no_value_to_prove_its_weight(variant: str) -> None:
    adapter = adapter_of(gemma3(), "embed_tokens", variant)
    layer, weight = adapter.base_layer, adapter.weight.detach()
    scale = layer.embed_scale
    assert scale > 1
    layer.embed_scale = torch.ones_like(scale, device="meta")  # as on a base without data
    assert merged_weight(weight, [adapter], torch.float32)[1].probe_error < 1e-5
    assert layer.embed_scale.is_meta
    layer.embed_scale = scale
    ids, rows = torch.arange(9), adapter.delta_weight()
    torch.testing.assert_close(adapter(ids), layer(ids) + scale * rows[:9], rtol=1e-4, atol=1e-5)


def test_several_corrections_are_added_before_the_one_rounding() -> None:
    adapters = [LAYERS["linear"](), adapter_of(tiny_opt(), "fc1", "vera")]
    weight = adapters[0].weight.detach().bfloat16()
    total = weight.float() + adapters[0].delta_weight() + adapters[1].delta_weight()
    merged, _ = merged_weight(weight, adapters, torch.bfloat16)
    torch.testing.assert_close(merged.float(), total.detach().bfloat16().float(), rtol=0.01, atol=0)


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_number_beyond_rounding_is_found_in_any_block(
    layer: str, dtype: torch.dtype, place: tuple[int, int]
) -> None:
    adapter = LAYERS[layer]()
    weight = adapter.weight.detach().to(dtype)
    merged, _ = merged_weight(weight, [adapter], dtype)
    largest = max(float(merged[place].abs()), float(weight[place].abs()))
    merged[place] += 8 * torch.finfo(dtype).eps * largest
    with pytest.raises(MergeError, match="beyond rounding"):
        prove_weight(weight, [adapter], merged)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_found(wrong: float) -> None:
    adapter = LAYERS["linear"]()
    weight = adapter.weight.detach().clone()
    weight[-1, 0] = wrong
    with pytest.raises(MergeError, match="NaN or infinite"):
        merged_weight(weight, [adapter], torch.float32)


WRONG: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]] = {
    "sign": lambda A, B, s: (A, B, -s),
    "scaling": lambda A, B, s: (A, B, 1.01 * s),
    "order": lambda A, B, s: (A.flip(1), B, s),
}


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("layer", LAYERS)
def test_factors_that_are_not_the_layers_own_are_found(layer: str, mistake: str) -> None:
    adapter = LAYERS[layer]()
    right = adapter.factors()
    adapter.factors = lambda: WRONG[mistake](*right)  # type: ignore[method-assign]
    with pytest.raises(MergeError, match="is not the adapter's"):
        merged_weight(adapter.weight.detach(), [adapter], torch.float32)


@pytest.mark.parametrize("share", [0.45, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_correction_that_cancels_the_weight_is_no_false_alarm(
    dtype: torch.dtype, share: float
) -> None:
    """The rounding of the sums themselves is then larger than that of the small result."""
    adapter = LAYERS["linear"]()
    delta = adapter.delta_weight().detach()
    torch.manual_seed(0)
    weight = (-share * delta * (1 + 0.01 * torch.randn(delta.shape))).to(dtype)
    _, proof = merged_weight(weight, [adapter], dtype)
    assert proof.residual < 1e-2


def test_a_merged_weight_of_another_shape_is_refused() -> None:
    adapter = LAYERS["linear"]()
    weight = adapter.weight.detach()
    merged, _ = merged_weight(weight, [adapter], torch.float32)
    with pytest.raises(MergeError, match="the merged one"):
        prove_weight(weight, [adapter], merged[:-1])
