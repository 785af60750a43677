"""IA3 against PEFT 0.21.2: equal to the bit in fp32 on a CPU."""

from __future__ import annotations

import pytest
import torch
from support.peft_oracle import PEFT_ABOUT_ITSELF, ia3_config, our_optimizer, peft_parameters
from support.tiny_models import FAMILIES, UNEQUAL

from parity.side_by_side import both_models, train_both

pytestmark = PEFT_ABOUT_ITSELF


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_loss_gradients_and_weights_equal_pefts_through_twenty_steps(
    family: str, number: int
) -> None:
    """The inputs of no kind of layer are scaled, of one, and of all."""
    targets = UNEQUAL[family]
    feedforward = [[], targets[-1:], targets][number]
    theirs, ours = both_models(
        FAMILIES[family](),
        ia3_config(target_modules=targets, feedforward_modules=feedforward),
        "ia3",
        targets,
        feedforward_layers=feedforward,
    )
    parameters = peft_parameters(theirs).values()
    their_optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    train_both(theirs, ours, their_optimizer, our_optimizer(ours, lr=1e-2, weight_decay=0.01))
