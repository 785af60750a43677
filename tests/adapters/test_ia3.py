"""What is special about IA3: it multiplies, and a merge changes the bias too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_oracle import our_model
from support.tiny_models import load_plain, logits, save_base, tiny_gpt2, tiny_llama, tiny_opt
from torch import nn

from adapters.test_saved_bytes import BATCH, LENGTH, frozen_base, saved_bytes, wrapped
from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.config import Kernel, LayerKind, LayerShape
from loratune.adapters.ia3.config import IA3Config
from loratune.adapters.ia3.module import IA3
from loratune.adapters.registry import config_class
from loratune.config.convert import to_plain
from loratune.config.schema import Dtype, MergeConfig, RunConfig
from loratune.config.value_checks import check_values
from loratune.errors import ConfigError
from loratune.models.fingerprint import base_fingerprint
from loratune.stages.merge import merge
from loratune.surgery import WrappedModel, merge_model


def with_biases(build: Any) -> Any:
    """A base whose biases are all random."""
    model = build()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def trained(build: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> WrappedModel:
    """A model whose factors are all random."""
    result = our_model(with_biases(build).to(dtype), "ia3", "all-linear", **settings)
    for layer in result.adapters.values():
        assert isinstance(layer, IA3)
        nn.init.uniform_(layer.ia3_l, 0.5, 1.5)
    return result


@pytest.mark.parametrize("build", [tiny_opt, tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("kernel", list(Kernel))
def test_outputs_are_the_formula_in_fp64(build: Any, kernel: Kernel) -> None:
    model = trained(build, kernel=kernel)
    kinds = set()
    for layer in model.adapters.values():
        assert isinstance(layer, IA3)
        weight = layer.weight.double()
        weight = weight if layer.shape.kind is LayerKind.linear else weight.T
        bias = 0.0 if layer.bias is None else layer.bias.double()
        x, factors = torch.randn(7, layer.in_features), layer.ia3_l.flatten().double()
        is_last = layer.shape.name.endswith(("fc2", "mlp.c_proj", "down_proj"))
        if is_last:
            expected = (x.double() * factors) @ weight.T + bias
        else:
            expected = factors * (x.double() @ weight.T + bias)
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
        kinds.add(is_last)
    assert kinds == {False, True}


@pytest.mark.parametrize("build", [tiny_opt, tiny_gpt2])
def test_merging_in_place_changes_weights_and_biases_and_goes_back(build: Any) -> None:
    model = trained(build)
    ids = torch.arange(12).reshape(2, 6)
    expected = model.model(ids).logits
    for layer in model.adapters.values():
        before = [layer.weight, layer.bias]
        values = [tensor.clone() for tensor in before if tensor is not None]
        layer.merge()
        assert layer.corrects_bias == (not torch.equal(layer.bias, values[1]))
        layer.unmerge()
        assert layer.weight is before[0] and layer.bias is before[1]
        assert torch.equal(layer.weight, values[0]) and torch.equal(layer.bias, values[1])
    torch.testing.assert_close(merge_model(model)(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_opt, tiny_gpt2])
def test_a_merged_folder_has_the_scaled_biases(
    build: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = trained(build, dtype)
    base = save_base(tmp_path / "base", with_biases(build).to(dtype))
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = to_plain(model.config)
    facts = {"variant": settings.pop("variant"), "adapter": settings}
    write_adapter(folder, model, {**facts, "base": base_fingerprint(base)}, str(base))
    out = tmp_path / "merged"
    merge([read_adapter(folder)], base, out, MergeConfig(dtype=Dtype.float32))
    merged = load_plain(out).state_dict()
    for name, layer in model.adapters.items():
        assert isinstance(layer, IA3)
        factors = 1.0 if layer.scales_inputs else layer.ia3_l.flatten()
        expected = layer.bias.float() * factors
        torch.testing.assert_close(merged[f"{name}.bias"], expected, atol=1e-6, rtol=1e-6)
    if dtype is torch.float32:
        theirs = logits(model.model.eval())
        torch.testing.assert_close(logits(load_plain(out)), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_what_is_multiplied_and_no_more(dtype: torch.dtype) -> None:
    model = wrapped("llama", "ia3", dtype)
    numbers = sum(
        layer.in_features if layer.scales_inputs else layer.out_features
        for layer in model.adapters.values()
        if isinstance(layer, IA3)
    )
    extra = saved_bytes(model.model) - saved_bytes(frozen_base("llama", dtype))
    # In half precision the product is made in fp32, which autograd keeps for neither factor.
    assert 0 < extra <= numbers * BATCH * LENGTH * dtype.itemsize


def test_a_layer_counts_its_outputs_or_its_inputs() -> None:
    config = IA3Config()
    layers = [LayerShape(f"layers.0.{name}", LayerKind.linear, 8, 24) for name in ("fc1", "fc2")]
    assert [config.count_layer(layer, 8).trainable for layer in layers] == [24, 8]
    assert config.count([(layer, 8) for layer in layers]).frozen == 0


@pytest.mark.parametrize("names", [[], ["fc2"], ["mlp.c_proj", "down_proj"]])
def test_the_names_survive_pefts_file(names: list[str]) -> None:
    config = IA3Config(feedforward_layers=names)
    assert IA3Config.from_peft(config.to_peft(), {}).feedforward_layers == names
    listed = {**config.to_peft(), "feedforward_modules": names}
    assert IA3Config.from_peft(listed, {}).feedforward_layers == names


def test_another_expression_is_refused() -> None:
    for expression in (".*fc2", r"(?:.*\.)?(?:fc[12])", r"(?:.*\.)?(?:fc2)|x"):
        with pytest.raises(ValueError, match="regular expression"):
            IA3Config.from_peft({"feedforward_modules": expression}, {})
    with pytest.raises(ConfigError, match="not the end of a layer's name"):
        IA3Config(feedforward_layers=["fc[12]"])


@pytest.mark.parametrize("variant", ["ia3", "oft"])
@pytest.mark.parametrize(
    "setting", [{"rank": 3}, {"alpha": 2.0}, {"dropout": 0.1}, {"rank_pattern": {"fc1": 2}}]
)
def test_a_recipe_cannot_set_what_has_no_effect(variant: str, setting: dict[str, Any]) -> None:
    adapter = config_class(variant)(**setting)
    config = RunConfig(adapter=adapter)
    (error,) = [one for one in check_values(config) if one.where.startswith("adapter.")]
    assert f"'adapter.{next(iter(setting))}' has no effect with {variant}" in str(error)
    assert not [
        one for one in check_values(RunConfig(adapter=config_class(variant)()))
        if one.where.startswith("adapter.")
    ]  # fmt: skip


def test_a_budget_takes_it_as_it_is() -> None:
    config = IA3Config()
    assert config.with_rank(64) is config
