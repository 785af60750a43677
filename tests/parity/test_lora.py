"""LoRA against PEFT 0.21.2: equal to the bit in fp32 on a CPU."""

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
    peft_parameters,
)
from support.tiny_models import ATTENTION, EMBEDDING, FAMILIES, UNEQUAL
from support.tolerance import T0

from parity.side_by_side import both_models, compare, train_both

pytestmark = PEFT_ABOUT_ITSELF
families = pytest.mark.parametrize("family", FAMILIES)

PATTERNS = {
    "opt": ({"fc1": 6, "layers.0.self_attn.q_proj": 2}, {"q_proj": 10.0}),
    "gpt2": ({"h.1.attn.c_attn": 2}, {"c_fc": 10.0}),
    "llama": ({"gate_proj": 6, "layers.0.self_attn.q_proj": 2}, {"v_proj": 10.0}),
}
# name: PEFT's settings, ours
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"lora_alpha": 8}, {"alpha": 8.0}),
    "rslora": ({"lora_alpha": 8, "use_rslora": True}, {"alpha": 8.0, "rslora": True}),
    "gaussian": ({"lora_alpha": 4, "init_lora_weights": "gaussian"}, {"init": "gaussian"}),
}


def adamw(parameters: Any, weight_decay: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)


@pytest.mark.case(25, T0)
@pytest.mark.case(10, T0)
@families
@pytest.mark.parametrize("kind", SETTINGS)
def test_loss_gradients_and_weights_equal_pefts_through_twenty_steps(
    family: str, kind: str
) -> None:
    theirs_settings, our_settings = SETTINGS[kind]
    theirs, ours = both_models(
        FAMILIES[family](),
        lora_config(r=4, target_modules=UNEQUAL[family], **theirs_settings),
        "lora",
        UNEQUAL[family],
        rank=4,
        **our_settings,
    )
    optimizers = (
        adamw(peft_parameters(theirs).values()),
        our_optimizer(ours, lr=1e-2, weight_decay=0.01),
    )
    losses = train_both(theirs, ours, *optimizers)
    assert losses[-1] != losses[0]


@families
@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_alpha_patterns_equal_pefts_through_twenty_steps(
    family: str, rslora: bool
) -> None:
    ranks, alphas = PATTERNS[family]
    theirs, ours = both_models(
        FAMILIES[family](),
        lora_config(
            r=4, lora_alpha=8, target_modules=UNEQUAL[family], rank_pattern=ranks,
            alpha_pattern=alphas, use_rslora=rslora,
        ),
        "lora",
        UNEQUAL[family],
        rank=4,
        alpha=8.0,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rslora=rslora,
    )  # fmt: skip
    assert len({layer.rank for layer in ours.adapters.values()}) > 1
    assert len({layer.alpha for layer in ours.adapters.values()}) > 1
    optimizers = (
        adamw(peft_parameters(theirs).values()),
        our_optimizer(ours, lr=1e-2, weight_decay=0.01),
    )
    train_both(theirs, ours, *optimizers)


@pytest.mark.case(29, T0)
@families
def test_dropout_draws_pefts_masks_through_twenty_steps(family: str) -> None:
    theirs, ours = both_models(
        FAMILIES[family](dropout=0.1),
        lora_config(r=4, lora_alpha=8, target_modules=UNEQUAL[family], lora_dropout=0.3),
        "lora",
        UNEQUAL[family],
        rank=4,
        alpha=8.0,
        dropout=0.3,
    )
    optimizers = adamw(peft_parameters(theirs).values(), 0.0), our_optimizer(ours, lr=1e-2)
    train_both(theirs, ours, *optimizers)


@families
def test_adapted_embeddings_and_saved_modules_equal_pefts_through_twenty_steps(family: str) -> None:
    saved = {"opt": "fc2", "gpt2": "ln_f", "llama": "lm_head"}[family]
    targets = [EMBEDDING[family], *ATTENTION[family]]
    theirs, ours = both_models(
        FAMILIES[family](tied=False),
        lora_config(r=4, lora_alpha=8, target_modules=targets, modules_to_save=[saved]),
        "lora",
        targets,
        rank=4,
        alpha=8.0,
        modules_to_save=(saved,),
    )
    optimizers = adamw(peft_parameters(theirs).values(), 0.0), our_optimizer(ours, lr=1e-2)
    train_both(theirs, ours, *optimizers)


@families
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_every_start_draws_pefts_numbers_from_the_same_seed(family: str, init: bool | str) -> None:
    targets = [*UNEQUAL[family], EMBEDDING[family]]
    ours_init = {True: "kaiming", False: "random", "gaussian": "gaussian"}[init]
    theirs, ours = both_models(
        FAMILIES[family](),
        lora_config(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=init),
        "lora",
        targets,
        rank=4,
        init=ours_init,
    )
    compare(our_parameters(ours), peft_lora_tensors(theirs), "start")
