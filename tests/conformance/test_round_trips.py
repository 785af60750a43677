"""Adapters to disk and back within loratune."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.peft_oracle import our_model, our_parameters
from support.tiny_models import EMBEDDING, FAMILIES, UNEQUAL, logits
from support.tolerance import T0

from conformance.test_training import VARIANTS, every_variant, stir
from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.config import Kernel
from loratune.config.convert import to_plain
from loratune.errors import ModelError
from loratune.surgery import WrappedModel

every_family = pytest.mark.parametrize("family", FAMILIES)


def written(
    folder: Path, family: str, variant: str, *, dtype: Any = torch.float32, **settings: Any
) -> WrappedModel:
    """A stirred adapter, and its folder on disk."""
    wrapped = our_model(
        FAMILIES[family]().to(dtype), variant, UNEQUAL[family], modules_to_save=("lm_head",),
        **VARIANTS[variant], **settings,
    )  # fmt: skip
    stir(wrapped)
    folder.mkdir()
    write_adapter(folder, wrapped, facts_of(wrapped), "base")
    return wrapped


def facts_of(wrapped: WrappedModel) -> dict[str, Any]:
    return {"variant": wrapped.config.variant, "adapter": to_plain(wrapped.config)}


def loaded(folder: Path, base: Any) -> WrappedModel:
    torch.manual_seed(12345)
    adapter = read_adapter(folder)
    adapter = replace(adapter, config=replace(adapter.config, kernel=Kernel.reference))
    return wrap_for_loading(base, adapter)


@pytest.mark.case(65, T0)
@pytest.mark.case(66, T0)
@pytest.mark.case(70, T0)
@every_variant
@every_family
def test_a_saved_adapter_loads_to_the_same_numbers_whatever_the_seed(
    tmp_path: Path, family: str, variant: str
) -> None:
    before = written(tmp_path / "a", family, variant)
    after = loaded(tmp_path / "a", FAMILIES[family]())
    T0.check(logits(after.model), logits(before.model))
    old, new = our_parameters(before), our_parameters(after)
    assert list(old) == list(new) or sorted(old) == sorted(new)
    for name, parameter in old.items():
        T0.check(new[name].detach(), parameter.detach(), name)
    trained = {id(p) for p in after.model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in new.values()}


@pytest.mark.case(68, T0)
@every_variant
@every_family
def test_loading_and_saving_again_gives_the_same_bytes(
    tmp_path: Path, family: str, variant: str
) -> None:
    written(tmp_path / "a", family, variant)
    again = loaded(tmp_path / "a", FAMILIES[family]())
    (tmp_path / "b").mkdir()
    write_adapter(tmp_path / "b", again, facts_of(again), "base")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.case(55, T0)
def test_veras_alpha_is_folded_once_however_often_it_is_saved(tmp_path: Path) -> None:
    before = written(tmp_path / "a", "opt", "vera", alpha=24.0)
    assert {layer.scaling for layer in before.adapters.values()} == {3.0}
    once = loaded(tmp_path / "a", FAMILIES["opt"]())
    (tmp_path / "b").mkdir()
    write_adapter(tmp_path / "b", once, facts_of(once), "base")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    for name, tensor in first.items():
        T0.check(second[name], tensor, name)


@pytest.mark.case(69, T0)
@every_variant
def test_a_missing_tensor_is_an_error_that_names_it(tmp_path: Path, variant: str) -> None:
    wrapped = written(tmp_path / "a", "opt", variant)
    adapter = read_adapter(tmp_path / "a")
    module, layer = next(iter(wrapped.adapters.items()))
    name = f"base_model.model.{module}.{list(layer.peft_tensors())[-1]}"
    fewer = {key: value for key, value in adapter.tensors.items() if key != name}
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        wrap_for_loading(FAMILIES["opt"](), replace(adapter, tensors=fewer))


@pytest.mark.case(71, T0)
@every_variant
def test_adapters_are_fp32_before_and_after_a_reload_on_a_half_precision_base(
    tmp_path: Path, variant: str
) -> None:
    before = written(tmp_path / "a", "opt", variant, dtype=torch.bfloat16)
    after = loaded(tmp_path / "a", FAMILIES["opt"]().to(torch.bfloat16))
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    for wrapped in (before, after):
        assert {p.dtype for p in our_parameters(wrapped).values()} == {torch.float32}
    T0.check(logits(after.model), logits(before.model))


@pytest.mark.case(72, T0)
@every_family
def test_an_adapted_embedding_is_stored_without_a_copy_of_the_base(
    tmp_path: Path, family: str
) -> None:
    wrapped = our_model(FAMILIES[family](), "lora", [EMBEDDING[family]], rank=4)
    stir(wrapped)
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", wrapped, facts_of(wrapped), "base")
    names = sorted(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    path = f"base_model.model.{next(iter(wrapped.adapters))}"
    assert names == [f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"]
    T0.check(logits(loaded(tmp_path / "a", FAMILIES[family]()).model), logits(wrapped.model))


@pytest.mark.case(52, T0)
def test_vera_without_stored_matrices_reloads_to_the_same_outputs(tmp_path: Path) -> None:
    before = written(tmp_path / "a", "llama", "vera", save_projection=False)
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert not [name for name in names if name.startswith("base_model.vera_")]
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["save_projection"] is False
    )
    T0.check(logits(loaded(tmp_path / "a", FAMILIES["llama"]()).model), logits(before.model))
