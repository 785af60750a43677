"""DoRA against PEFT 0.21.2: equal to the bit in fp32 on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import (
    PEFT_ABOUT_ITSELF,
    lora_config,
    our_optimizer,
    peft_parameters,
)
from support.tiny_models import EMBEDDING, FAMILIES, UNEQUAL

from parity.side_by_side import both_models, train_both

pytestmark = PEFT_ABOUT_ITSELF
families = pytest.mark.parametrize("family", FAMILIES)
# name: PEFT's settings, ours
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"lora_alpha": 8}, {"alpha": 8.0}),
    "scaling no power of two": ({"lora_alpha": 6}, {"alpha": 6.0}),
    "rslora": ({"lora_alpha": 8, "use_rslora": True}, {"alpha": 8.0, "rslora": True}),
    "dropout": ({"lora_alpha": 8, "lora_dropout": 0.3}, {"alpha": 8.0, "dropout": 0.3}),
    "random": ({"lora_alpha": 8, "init_lora_weights": False}, {"alpha": 8.0, "init": "random"}),
}


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(peft_parameters(model).values(), lr=1e-2, weight_decay=0.01)


@families
@pytest.mark.parametrize("kind", SETTINGS)
def test_loss_gradients_and_weights_equal_pefts_through_twenty_steps(
    family: str, kind: str
) -> None:
    theirs_settings, our_settings = SETTINGS[kind]
    theirs, ours = both_models(
        FAMILIES[family](),
        lora_config(r=4, use_dora=True, target_modules=UNEQUAL[family], **theirs_settings),
        "dora",
        UNEQUAL[family],
        rank=4,
        **our_settings,
    )
    train_both(theirs, ours, adamw(theirs), our_optimizer(ours, lr=1e-2, weight_decay=0.01))


@families
def test_an_adapted_embedding_equals_pefts_through_twenty_steps(family: str) -> None:
    targets = [EMBEDDING[family], *UNEQUAL[family]]
    theirs, ours = both_models(
        FAMILIES[family](tied=False),
        lora_config(r=4, lora_alpha=6, use_dora=True, target_modules=targets),
        "dora",
        targets,
        rank=4,
        alpha=6.0,
    )
    train_both(theirs, ours, adamw(theirs), our_optimizer(ours, lr=1e-2, weight_decay=0.01))
