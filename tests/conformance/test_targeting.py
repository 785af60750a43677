"""Which layers are adapted."""

from __future__ import annotations

import pytest
import torch
from support.peft_oracle import lora_config, our_model, peft_model, peft_parameters
from support.tiny_models import FAMILIES, UNEQUAL, tiny_gpt2, tiny_opt
from support.tolerance import T0
from torch import nn

from loratune.errors import LoratuneError, ModelError
from loratune.models.measure import layer_shapes


@pytest.mark.case(15, T0)
@pytest.mark.parametrize("names", [["nothing"], ["q_proj", "o_proj"]])
def test_every_name_that_matches_nothing_is_an_error(names: list[str]) -> None:
    model = tiny_opt()
    with pytest.raises(ModelError, match=names[-1]):
        our_model(model, "lora", names, rank=4)
    assert all(type(module).__name__ != "LoRA" for module in model.modules())


@pytest.mark.case(16, T0)
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_blocks_alone_are_adapted_as_in_peft(family: str) -> None:
    targets = UNEQUAL[family]
    ours = our_model(FAMILIES[family](), "lora", targets, rank=4, layers=[0])
    config = lora_config(r=4, target_modules=targets, layers_to_transform=[0])
    theirs = {
        name.removeprefix("base_model.model.").split(".lora_")[0]
        for name in peft_parameters(peft_model(FAMILIES[family](), config))
    }
    assert set(ours.adapters) == theirs and len(theirs) == len(targets)


@pytest.mark.case(16, T0)
def test_a_block_that_the_model_has_not_is_an_error() -> None:
    with pytest.raises(ModelError, match="no block 7"):
        our_model(tiny_opt(), "lora", ["q_proj"], rank=4, layers=[0, 7])


@pytest.mark.case(18, T0)
def test_a_module_cannot_be_adapted_and_trained_in_full() -> None:
    with pytest.raises(LoratuneError, match="q_proj"):
        our_model(tiny_opt(), "lora", ["q_proj"], rank=4, modules_to_save=("q_proj",))


@pytest.mark.case(19, T0)
def test_wrapped_layers_show_their_sizes() -> None:
    wrapped = our_model(tiny_gpt2(), "lora", ["c_attn", "c_fc", "wte"], rank=4)
    sizes = {
        name.rsplit(".", 1)[-1]: (layer.in_features, layer.out_features)
        for name, layer in wrapped.adapters.items()
    }
    assert sizes == {"c_attn": (16, 48), "c_fc": (16, 24), "wte": (300, 16)}


@pytest.mark.case(21, T0)
@pytest.mark.case(49, T0)
@pytest.mark.case(50, T0)
@pytest.mark.case(53, T0)
def test_a_model_holds_one_adapter_and_a_second_is_refused() -> None:
    wrapped = our_model(tiny_opt(), "lora", ["q_proj"], rank=4)
    before = sorted(name for name, _ in wrapped.model.named_modules())
    with pytest.raises(LoratuneError):
        our_model(wrapped.model, "vera", ["q_proj"], rank=4)
    assert sorted(name for name, _ in wrapped.model.named_modules()) == before


def test_layers_of_other_kinds_are_refused_by_name() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1), "linear": nn.Linear(4, 4)})
    assert [shape.name for shape in layer_shapes(model)] == ["linear"]
    with pytest.raises(ModelError, match="conv"):
        our_model(model, "lora", ["conv", "linear"], rank=2)


def test_wrapping_any_module_works_without_a_hugging_face_configuration() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(4, 6)
    expected = model(x)
    wrapped = our_model(model, "lora", ["0", "2"], rank=2)
    T0.check(wrapped.model(x), expected)
