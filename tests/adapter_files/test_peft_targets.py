"""What is known of PEFT's treatment of layer names, against the installed PEFT."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.peft_oracle import lora_config, our_model
from support.tiny_models import tiny_llama
from torch import nn

from loratune.adapter_files import peft_targets


def test_peft_takes_these_names_for_experts() -> None:
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING

    theirs = {family: frozenset(names) for family, names in _MOE_TARGET_MODULE_MAPPING.items()}
    assert theirs == peft_targets._TAKEN_FOR_EXPERTS


@pytest.mark.parametrize("layer", ["out_proj", "conv1d", "in_proj", "x_proj", "q_proj"])
def test_peft_refuses_these_layers_in_these_models(layer: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    refused = {kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if peft_refuses(kind, layer)}
    ours = peft_targets._STATE_SPACE if layer in peft_targets._REFUSED_THERE else frozenset()
    assert refused == ours


def peft_refuses(model_type: str, layer: str) -> bool:
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    try:
        _check_lora_target_modules_mamba(lora_config(), model, layer)
    except ValueError:
        return True
    return False


# -- names --------------------------------------------------------------------------------


def test_a_last_name_will_do_where_every_such_module_is_adapted() -> None:
    wrapped = our_model(tiny_llama(), "lora", ["q_proj", "v_proj"])
    settings = peft_targets.peft_targets(wrapped, wrapped.config.to_peft()).settings
    assert settings == {"target_modules": ["q_proj", "v_proj"]}


def test_full_names_where_some_are_not() -> None:
    wrapped = our_model(tiny_llama(), "lora", ["q_proj"], layers=[1])
    settings = peft_targets.peft_targets(wrapped, wrapped.config.to_peft()).settings
    assert settings == {"target_modules": ["model.layers.1.self_attn.q_proj"]}


def test_an_expression_where_a_full_name_is_the_end_of_another() -> None:
    model = nn.ModuleDict({"head": nn.Linear(3, 4), "block": nn.ModuleDict()})
    model["block"].update({"head": nn.Linear(3, 4), "up": nn.Linear(3, 4)})
    wrapped = our_model(model, "lora", r"head|block\.up")
    got = peft_targets.peft_targets(wrapped, wrapped.config.to_peft())
    assert not got.problem
    theirs = lora_config(**got.settings)
    from peft.tuners.tuners_utils import check_target_module_exists

    names = [name for name, _ in wrapped.model.named_modules() if name]
    assert [name for name in names if check_target_module_exists(theirs, name)] == [
        "head",
        "block.up",
    ]


@pytest.mark.parametrize("modules", [["q_proj"], r".*q_proj", []])
def test_weights_of_layers_are_read_as_the_layers(modules: list[str] | str) -> None:
    peft = {
        "target_modules": modules,
        "target_parameters": ["model.layers.0.mlp.up_proj.weight"],
        "rank_pattern": {"up_proj": 2, "model.layers.0.mlp.up_proj.weight": 2},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
    }
    read = peft_targets.as_modules(peft, {"adapter": {"dropout": 0.1}})
    assert read["rank_pattern"] == {"up_proj": 2} and read["lora_dropout"] == 0.1
    wrapped = our_model(tiny_llama(), "lora", read["target_modules"])
    expected = {"model.layers.0.mlp.up_proj"}
    expected |= {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} if modules else set()
    assert set(wrapped.adapters) == expected
    assert peft_targets.as_modules(peft, {})["lora_dropout"] == 0.0


def test_parameters_that_are_not_a_layers_weight_are_read_under_their_own_name() -> None:
    peft = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    read = peft_targets.as_modules(peft, {})
    assert read["target_modules"] == ["q_proj", "experts.gate_up_proj"]
    assert read["target_parameters"] is None
    unlisted = {"target_modules": ["q_proj"], "target_parameters": [1]}
    assert peft_targets.as_modules(unlisted, {}) == unlisted
