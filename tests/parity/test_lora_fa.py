"""LoRA-FA against PEFT 0.21.2, plain and with the closed-form gradient: equal to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import (
    PEFT_ABOUT_ITSELF,
    lora_config,
    our_optimizer,
    our_parameters,
    peft_lora_tensors,
    peft_model,
    peft_parameters,
)
from support.tiny_models import ATTENTION, FAMILIES, UNEQUAL
from support.tolerance import T0

from parity.side_by_side import SEED, compare, train_both

pytestmark = PEFT_ABOUT_ITSELF
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def _fp32_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT projects under bf16 autocast wherever bf16 exists: switched off, as in its own tests."""
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)


def both(family: str, peft_settings: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """PEFT's LoRA with A frozen by hand, and loratune's LoRA-FA."""
    from support.peft_oracle import our_model

    targets = UNEQUAL[family]
    config = lora_config(r=4, lora_alpha=8, target_modules=targets, **peft_settings)
    theirs = peft_model(FAMILIES[family](), config, SEED)
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    ours = our_model(
        FAMILIES[family](), "lora_fa", targets, seed=SEED, rank=4, alpha=8.0, **settings
    )
    return theirs, ours


@families
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_training_of_b_equals_pefts_through_twenty_steps(family: str, dropout: float) -> None:
    theirs, ours = both(family, {"lora_dropout": dropout}, dropout=dropout)
    optimizers = (
        torch.optim.AdamW(peft_parameters(theirs).values(), lr=1e-2, weight_decay=0.01),
        our_optimizer(ours, lr=1e-2, weight_decay=0.01),
    )
    train_both(theirs, ours, *optimizers)
    frozen = {
        name: tensor for name, tensor in peft_lora_tensors(theirs).items() if "lora_A" in name
    }
    compare(_frozen(ours), frozen, "A")


@pytest.mark.case(28, T0)
@families
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.usefixtures("_fp32_in_peft")
def test_projected_training_equals_pefts_optimizer_through_twenty_steps(
    family: str, use_rslora: bool
) -> None:
    from peft.optimizers import create_lorafa_optimizer

    last = UNEQUAL[family][-1]
    theirs, ours = both(
        family,
        {"use_rslora": use_rslora, "rank_pattern": {last: 2}, "alpha_pattern": {last: 6}},
        rslora=use_rslora,
        rank_pattern={last: 2},
        alpha_pattern={last: 6.0},
        projected=True,
    )
    assert len({layer.scaling for layer in ours.adapters.values()}) == 2
    theirs_optimizer = create_lorafa_optimizer(
        theirs, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.05
    )
    train_both(theirs, ours, theirs_optimizer, our_optimizer(ours, lr=1e-2, weight_decay=0.05))


@pytest.mark.case(31, T0)
@pytest.mark.parametrize("rslora", [False, True])
def test_every_a_is_frozen_and_every_b_trains_from_the_start(rslora: bool) -> None:
    _, ours = both("opt", {"use_rslora": rslora}, rslora=rslora)
    names = list(our_parameters(ours))
    assert names and all(name.endswith("lora_B.weight") for name in names)
    assert len(names) == len(ours.adapters)


@pytest.mark.usefixtures("_fp32_in_peft")
def test_saved_modules_follow_the_same_rule_as_in_peft() -> None:
    from peft.optimizers import create_lorafa_optimizer
    from support.peft_oracle import our_model

    config = lora_config(
        r=4, lora_alpha=8, target_modules=ATTENTION["opt"], modules_to_save=["fc2"]
    )
    theirs = peft_model(FAMILIES["opt"](), config, SEED)
    theirs_optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.0)
    ours = our_model(
        FAMILIES["opt"](), "lora_fa", ATTENTION["opt"], seed=SEED, rank=4, alpha=8.0,
        projected=True, modules_to_save=("fc2",),
    )  # fmt: skip
    train_both(theirs, ours, theirs_optimizer, our_optimizer(ours, lr=1e-2))


def _frozen(ours: Any) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{name}.lora_A.weight": layer.lora_A
        for name, layer in ours.adapters.items()
    }
