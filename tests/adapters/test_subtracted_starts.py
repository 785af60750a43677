"""PiSSA and OLoRA: starts from the base's own numbers that never change the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange.adapters import load_with_peft, tensors_of
from parity.side_by_side import one_backward
from support.peft_oracle import (
    PEFT_ABOUT_ITSELF,
    lora_config,
    our_model,
    our_optimizer,
    our_parameters,
    peft_model,
    peft_parameters,
)
from support.tiny_models import FAMILIES, UNEQUAL, load_plain, logits, save_base, tiny_gpt2
from support.tolerance import T1, T2, largest
from torch import Tensor, nn

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.config import LayerKind
from loratune.adapters.lora.config import Init, LoRAConfig
from loratune.adapters.lora.module import LoRA
from loratune.adapters.registry import config_class
from loratune.config.convert import to_plain
from loratune.errors import LoratuneError, ModelError
from loratune.merging.weight import merged_weight
from loratune.surgery import WrappedModel

pytestmark = [
    *PEFT_ABOUT_ITSELF,
    pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning"),
]
starts = pytest.mark.parametrize("init", ["pissa", "olora"])
families = pytest.mark.parametrize("family", FAMILIES)
SETTINGS = {"rank": 4, "alpha": 6.0}


def layers(wrapped: WrappedModel) -> list[LoRA]:
    return [layer for layer in wrapped.adapters.values() if isinstance(layer, LoRA)]


def save(wrapped: WrappedModel, folder: Path, base: Path) -> Path:
    """The adapter folder that a training leaves."""
    folder.mkdir()
    settings = to_plain(wrapped.config)
    facts = {"variant": settings.pop("variant"), "adapter": settings}
    write_adapter(folder, wrapped, facts, str(base))
    return folder


@starts
@families
@pytest.mark.parametrize("kernel", ["reference", "fused"])
def test_it_starts_exactly_as_the_base_with_the_bases_leading_part(
    family: str, init: str, kernel: str
) -> None:
    base = FAMILIES[family]()
    expected, before = logits(base), copy.deepcopy(base.state_dict())
    wrapped = our_model(base, "lora", UNEQUAL[family], init=init, kernel=kernel, **SETTINGS)
    assert torch.equal(logits(wrapped.model), expected)
    for name, layer in wrapped.adapters.items():
        assert isinstance(layer, LoRA)
        assert torch.equal(layer.weight, before[f"{name}.weight"])
        weight = layer.weight if layer.shape.kind is LayerKind.linear else layer.weight.T
        part = layer.scaling * (layer.lora_B @ layer.lora_A)
        if init == "pissa":  # the rest is what no matrix of this rank comes closer to
            left = torch.linalg.svdvals(weight.double())[4:].square().sum().sqrt()
            torch.testing.assert_close((weight - part).double().norm(), left, atol=1e-5, rtol=1e-5)
        else:
            Q, R = torch.linalg.qr(weight.double())
            whole = layer.scaling * Q[:, :4] @ R[:4]
            torch.testing.assert_close(part.double(), whole, atol=1e-5, rtol=1e-5)


def train_both(
    family: str, init: str, **settings: Any
) -> tuple[Any, WrappedModel, dict[str, Tensor]]:
    """Twenty steps of PEFT's and ours side by side, and PEFT's factors before them."""
    targets, base = UNEQUAL[family], FAMILIES[family]()
    theirs = peft_model(
        copy.deepcopy(base),
        lora_config(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init, **settings),
        11,
    )
    ours = our_model(
        base, "lora", targets, seed=11, init=init, rslora="use_rslora" in settings, **SETTINGS
    )
    start = {name: tensor.detach().clone() for name, tensor in peft_parameters(theirs).items()}
    for name, tensor in our_parameters(ours).items():
        T1.check(tensor.detach(), start[name], f"start of {name}")
    their_optimizer = torch.optim.AdamW(peft_parameters(theirs).values(), lr=1e-3)
    our_own = our_optimizer(ours, lr=1e-3, weight_decay=0.01)
    for step in range(20):
        expected = one_backward(theirs, their_optimizer, step)
        got = one_backward(ours.model, our_own, step)
        T2.check(got, expected, f"loss of step {step}")
        if step == 0:
            for name, tensor in peft_parameters(theirs).items():
                T2.check(our_parameters(ours)[name].grad, tensor.grad, f"gradient of {name}")
        their_optimizer.step()
        our_own.step()
    return theirs, ours, start


CASES = [(family, "pissa") for family in FAMILIES] + [("opt", "olora"), ("llama", "olora")]
"""PEFT's OLoRA does not turn a Conv1D's weight, and fails on unequal shapes."""


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("family", "init"), CASES)
def test_training_and_the_file_are_those_of_pefts_converted_adapter(
    family: str, init: str, use_rslora: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", FAMILIES[family]())
    more = {"use_rslora": True} if use_rslora else {}
    theirs, ours, start = train_both(family, init, **more)
    # What PEFT's documentation asks for: the untrained adapter, saved with a plain start.
    trained = {name: t.detach().clone() for name, t in peft_parameters(theirs).items()}
    with torch.no_grad():
        for name, parameter in peft_parameters(theirs).items():
            parameter.copy_(start[name])
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in peft_parameters(theirs).items():
            parameter.copy_(trained[name])
    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )

    folder = save(ours, tmp_path / "ours", base)
    expected, got = tensors_of(tmp_path / "converted"), tensors_of(folder)
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        T2.check(got[name], tensor, name)
    files = [tmp_path / one / "adapter_config.json" for one in ("converted", "ours")]
    configs = [json.loads(path.read_text()) for path in files]
    assert configs[0]["r"] == configs[1]["r"] == 8
    assert configs[0]["lora_alpha"] == pytest.approx(configs[1]["lora_alpha"])
    converted = logits(load_with_peft(base, tmp_path / "converted"))
    loaded = logits(load_with_peft(base, folder))
    T2.check(loaded, converted)
    T2.check(logits(ours.model), loaded)
    assert largest(loaded, logits(load_plain(base))) > 1e-3


@starts
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 7.0])
def test_a_saved_adapter_is_read_to_the_bit_and_trains_on_from_its_start(
    init: str, rslora: bool, alpha: float | None, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tiny_gpt2())
    wrapped = our_model(
        load_plain(base), "lora_plus", UNEQUAL["gpt2"], init=init, rank=4, alpha=alpha,
        rslora=rslora, rank_pattern={"c_fc": 2}, alpha_pattern={"c_attn": 3.0},
    )  # fmt: skip
    for layer in layers(wrapped):
        nn.init.normal_(layer.lora_B)
    again = wrap_for_loading(load_plain(base), read_adapter(save(wrapped, tmp_path / "ours", base)))
    assert to_plain(again.config) == to_plain(wrapped.config)
    for one, other in zip(layers(again), layers(wrapped), strict=True):
        assert one.rank == other.rank and one.scaling == other.scaling
        for name, tensor in other.adapter_tensors().items():
            assert torch.equal(one.adapter_tensors()[name], tensor), name
    assert torch.equal(logits(again.model), logits(wrapped.model))
    T2.check(logits(load_with_peft(base, tmp_path / "ours")), logits(wrapped.model))
    assert [p.shape for p in our_parameters(again).values()] == [
        p.shape for p in our_parameters(wrapped).values()
    ]


def test_half_precision_keeps_what_is_learnt() -> None:
    """Factors of the size of W: a step of them is less than one rounding in bf16."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256, bias=False)).bfloat16()
    wrapped = our_model(base, "lora", ["0"], init="pissa", rank=8, kernel="fused")
    (layer,) = layers(wrapped)
    with torch.no_grad():
        layer.lora_A.mul_(1 + 2**-12)
        layer.lora_B.mul_(1 + 2**-12)
    x = torch.randn(64, 256).bfloat16()
    with torch.no_grad():
        change = layer(x).double() - base_output(layer, x).double()
        exact = x.double() @ layer.delta_weight().double().T
    # Rounding of y itself is noise; what is learnt shows along the exact change.
    assert 0.7 < float((change * exact).sum() / exact.square().sum()) < 1.3


def base_output(layer: LoRA, x: Tensor) -> Tensor:
    layer.enabled = False
    y = layer(x)
    layer.enabled = True
    return y


@starts
def test_its_merge_proves_itself_and_counts_are_those_of_the_file(init: str) -> None:
    wrapped = our_model(tiny_gpt2(), "lora", "all-linear", init=init, rank=3)
    shapes = [(layer.shape, layer.rank) for layer in layers(wrapped)]
    count = wrapped.config.count(shapes)
    assert count.trainable == sum(p.numel() for p in our_parameters(wrapped).values())
    files = [t for layer in layers(wrapped) for t in layer.peft_tensors().values()]
    assert count.stored == sum(t.numel() for t in files) == 2 * count.trainable
    for layer in layers(wrapped):
        assert not layer.delta_weight().any()
        nn.init.normal_(layer.lora_A, std=0.1)
        expected = layer.lora_B.double() @ layer.lora_A.double()
        expected -= layer.start_B.double() @ layer.start_A.double()
        weight = layer.weight.detach()
        merged, proof = merged_weight(weight, [layer], torch.float32)
        assert proof.probe_error < 1e-5
        change = layer.scaling * (expected if layer.shape.kind == "linear" else expected.T)
        torch.testing.assert_close(merged.double(), weight + change, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("variant", ["lora_fa", "dora"])
@starts
def test_variants_that_cannot_take_a_start_away_refuse_it(variant: str, init: str) -> None:
    with pytest.raises(LoratuneError, match=f"{variant} cannot start with init={init}"):
        config_class(variant)(init=Init(init))


@starts
def test_an_embedding_and_too_high_a_rank_are_refused(init: str) -> None:
    with pytest.raises(LoratuneError, match="cannot start an embedding"):
        our_model(tiny_gpt2(), "lora", ["wte"], init=init)
    with pytest.raises(ModelError, match="rank to at most 16"):
        our_model(tiny_gpt2(), "lora", ["c_proj"], init=init, rank=17)


def test_a_file_that_is_not_twice_the_recorded_rank_is_refused() -> None:
    config = LoRAConfig(rank=3, init=Init.pissa)
    with pytest.raises(ValueError, match="r is 8, and 6 with init=pissa"):
        LoRAConfig.from_peft({**config.to_peft(), "r": 8}, to_plain(config))
