"""LoRA+ against PEFT 0.21.2's helper: the same groups, the same numbers to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import (
    PEFT_ABOUT_ITSELF,
    lora_config,
    our_optimizer,
    our_parameters,
    peft_parameters,
)
from support.tiny_models import ATTENTION, EMBEDDING, FAMILIES, tiny_opt
from support.tolerance import T0

from parity.side_by_side import both_models, train_both

pytestmark = PEFT_ABOUT_ITSELF
families = pytest.mark.parametrize("family", FAMILIES)
SAVED = {"opt": "fc2", "gpt2": "ln_f", "llama": "up_proj"}
RATE, RATIO, DECAY, EMBEDDING_RATE = 1e-3, 16.0, 0.01, 1e-4


def their_optimizer(model: Any, **settings: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, **settings
    )


@pytest.mark.case(26, T0)
@families
def test_all_four_groups_equal_pefts_through_twenty_steps(family: str) -> None:
    targets = [EMBEDDING[family], *ATTENTION[family]]
    theirs, ours = both_models(
        FAMILIES[family](tied=False),
        lora_config(r=4, lora_alpha=8, target_modules=targets, modules_to_save=[SAVED[family]]),
        "lora_plus",
        targets,
        rank=4,
        alpha=8.0,
        lr_ratio=RATIO,
        embedding_lr=EMBEDDING_RATE,
        modules_to_save=(SAVED[family],),
    )
    peft_optimizer = their_optimizer(
        theirs, loraplus_weight_decay=DECAY, loraplus_lr_embedding=EMBEDDING_RATE
    )
    optimizer = our_optimizer(ours, lr=RATE, weight_decay=DECAY)
    assert _rates(optimizer, our_parameters(ours)) == _rates(
        peft_optimizer, peft_parameters(theirs)
    )
    train_both(theirs, ours, peft_optimizer, optimizer)


@pytest.mark.case(42, T0)
@pytest.mark.case(43, T0)
def test_the_four_groups_have_pefts_rates_decay_and_members() -> None:
    targets = ["embed_tokens", "q_proj"]
    theirs, ours = both_models(
        tiny_opt(tied=False),
        lora_config(r=4, target_modules=targets, modules_to_save=["fc2"]),
        "lora_plus",
        targets,
        rank=4,
        alpha=8.0,
        modules_to_save=("fc2",),
    )
    groups = {g["name"]: (g["lr"], g["weight_decay"]) for g in our_optimizer(
        ours, lr=RATE, weight_decay=DECAY).param_groups}  # fmt: skip
    assert groups == {
        "A": (RATE, DECAY),
        "embedding": (1e-6, DECAY),
        "B": (RATE * RATIO, DECAY),
        "B_no_decay": (RATE * RATIO, 0.0),
    }
    peft_rates = _rates(
        their_optimizer(theirs, loraplus_weight_decay=DECAY), peft_parameters(theirs)
    )
    rates = _rates(our_optimizer(ours, lr=RATE, weight_decay=DECAY), our_parameters(ours))
    assert rates == peft_rates
    assert rates["base_model.model.model.decoder.layers.0.fc2.bias"] == (RATE * RATIO, 0.0)
    assert rates["base_model.model.model.decoder.layers.0.fc2.weight"] == (RATE, DECAY)


@pytest.mark.case(45, T0)
def test_weight_decay_reaches_the_groups_here_and_is_dropped_by_pefts_helper() -> None:
    theirs, ours = both_models(
        tiny_opt(), lora_config(r=4, target_modules=["q_proj"]), "lora_plus", ["q_proj"], rank=4,
        alpha=8.0,
    )  # fmt: skip
    dropped = their_optimizer(theirs, weight_decay=DECAY)
    assert {group["weight_decay"] for group in dropped.param_groups} == {0.0}
    kept = our_optimizer(ours, lr=RATE, weight_decay=DECAY)
    assert {group["weight_decay"] for group in kept.param_groups} == {DECAY}


def _rates(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """Parameter name to learning rate and decay; a parameter in two groups fails."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    rates: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in rates
            rates[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert len(rates) == len(parameters)
    return rates
