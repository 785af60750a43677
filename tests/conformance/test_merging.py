"""Merging into a model in memory, and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_oracle import (
    lora_config,
    our_model,
    our_parameters,
    peft_model,
    peft_parameters,
)
from support.tiny_models import EMBEDDING, FAMILIES, UNEQUAL, logits, tiny_opt
from support.tolerance import T0, T1, T2, largest

from conformance.test_training import VARIANTS, every_variant, loss_of, stir
from loratune.errors import ModelError
from loratune.surgery import WrappedModel, merge_model, unwrap_model


def adapted(family: str, variant: str = "lora", *, embedding: bool = False) -> WrappedModel:
    targets = [*UNEQUAL[family], *([EMBEDDING[family]] if embedding else [])]
    wrapped = our_model(FAMILIES[family](), variant, targets, **VARIANTS[variant])
    stir(wrapped)
    return wrapped


@pytest.mark.case(56, T2)
@every_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_merged_unmerged_and_unwrapped_agree(family: str, variant: str) -> None:
    wrapped = adapted(family, variant)
    base, before = logits(FAMILIES[family]()), logits(wrapped.model)
    for layer in wrapped.adapters.values():
        layer.merge()
    T2.check(logits(wrapped.model), before)
    for layer in wrapped.adapters.values():
        layer.unmerge()
    T0.check(logits(wrapped.model), before)
    plain = merge_model(wrapped)
    T2.check(logits(plain), before)
    assert largest(before, base) > 1e-2
    fresh = FAMILIES[family]()
    kinds = [type(module) for _, module in fresh.named_modules()]
    assert [type(module) for _, module in plain.named_modules()] == kinds


@pytest.mark.case(57, T1)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_saves_as_contiguous_safetensors(family: str, tmp_path: Path) -> None:
    wrapped = adapted(family)
    names = [f"{name}.weight" for name in wrapped.adapters]
    expected = logits(wrapped.model)
    state = merge_model(wrapped).state_dict()
    assert all(state[name].is_contiguous() for name in names)
    save_file({name: state[name] for name in names}, tmp_path / "merged.safetensors")
    loaded = load_file(tmp_path / "merged.safetensors")
    fresh = FAMILIES[family]()
    fresh.load_state_dict(loaded, strict=False)
    T2.check(logits(fresh), expected)


@pytest.mark.case(58, T0)
@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged_and_the_base_stays(variant: str, value: float) -> None:
    wrapped = adapted("opt", variant)
    before = {n: layer.weight.detach().clone() for n, layer in wrapped.adapters.items()}
    trained = [t for layer in wrapped.adapters.values() for t in layer.adapter_tensors().values()]
    with torch.no_grad():
        trained[-1].view(-1)[0] = value
    name, layer = list(wrapped.adapters.items())[-1]
    with pytest.raises(ModelError, match="NaN or infinite") as caught:
        layer.merge()
    assert caught.value.where == name and not layer.merged
    T0.check(layer.weight.detach(), before[name])
    with pytest.raises(ModelError, match="NaN or infinite"):
        merge_model(wrapped)
    for module in wrapped.model.modules():
        for own in module.parameters(recurse=False):
            if not own.requires_grad:
                assert bool(torch.isfinite(own).all())


@pytest.mark.case(59, T0)
def test_merging_twice_changes_nothing_more() -> None:
    wrapped = adapted("opt")
    layer = next(iter(wrapped.adapters.values()))
    layer.merge()
    once = layer.weight.detach().clone()
    layer.merge()
    T0.check(layer.weight.detach(), once)
    layer.unmerge()
    layer.unmerge()
    T0.check(layer.weight.detach(), tiny_opt().get_submodule(layer.shape.name).weight.detach())


@pytest.mark.case(60, T0)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_weights_merge_in_fp32_rounded_once(family: str, dtype: Any) -> None:
    wrapped = our_model(FAMILIES[family]().to(dtype), "lora", UNEQUAL[family], rank=4)
    stir(wrapped)
    for layer in wrapped.adapters.values():
        before = layer.weight.detach().clone()
        layer.merge()
        assert layer.weight.dtype is dtype
        T0.check(layer.weight.detach(), (before.float() + layer.delta_weight()).detach().to(dtype))
        layer.unmerge()
        T0.check(layer.weight.detach(), before)


@pytest.mark.case(62, T1)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_weights_are_pefts(family: str) -> None:
    targets = [*UNEQUAL[family], EMBEDDING[family]]
    base = FAMILIES[family](tied=False)
    config = lora_config(r=4, lora_alpha=8, target_modules=targets)
    theirs = peft_model(copy.deepcopy(base), config, seed=1)
    ours = our_model(base, "lora", targets, seed=1, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in our_parameters(ours).items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            peft_parameters(theirs)[name].copy_(parameter)
    expected = dict(theirs.merge_and_unload().state_dict())
    for name, tensor in merge_model(ours).state_dict().items():
        T1.check(tensor, expected[name], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_while_merged_is_refused_and_evaluating_is_not(family: str) -> None:
    wrapped = adapted(family)
    for layer in wrapped.adapters.values():
        layer.merge()
    logits(wrapped.model)
    with pytest.raises(ModelError, match="merged cannot train"):
        loss_of(wrapped.model.train())


@every_variant
def test_unwrapping_gives_back_the_very_base(variant: str) -> None:
    base = tiny_opt()
    before, shared = logits(base), base.state_dict(keep_vars=True)
    wrapped = our_model(base, variant, UNEQUAL["opt"], **VARIANTS[variant])
    stir(wrapped)
    for layer in wrapped.adapters.values():
        layer.merge()
    plain = unwrap_model(wrapped)
    T0.check(logits(plain), before)
    after = plain.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, tensor in shared.items())
