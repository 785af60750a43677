"""OFT against PEFT 0.21.2, which has it for no Conv1D: equal to the bit in fp32 on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import PEFT_ABOUT_ITSELF, oft_config, our_optimizer, peft_parameters
from support.tiny_models import FAMILIES, UNEQUAL

from parity.side_by_side import both_models, train_both

pytestmark = [
    *PEFT_ABOUT_ITSELF,
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning"),
]
# name: PEFT's settings, ours
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blocks of 4": ({"oft_block_size": 4}, {"block_size": 4}),
    "blocks that do not divide": ({"oft_block_size": 5}, {"block_size": 5}),
    "one block": ({"oft_block_size": 32}, {"block_size": 32}),
    "seven terms": (
        {"oft_block_size": 8, "num_cayley_neumann_terms": 7},
        {"block_size": 8, "cayley_terms": 7},
    ),
    "exact": (
        {"oft_block_size": 8, "use_cayley_neumann": False},
        {"block_size": 8, "cayley_terms": 0},
    ),
}


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_loss_gradients_and_weights_equal_pefts_through_twenty_steps(
    family: str, kind: str
) -> None:
    theirs_settings, our_settings = SETTINGS[kind]
    theirs, ours = both_models(
        FAMILIES[family](),
        oft_config(target_modules=UNEQUAL[family], **theirs_settings),
        "oft",
        UNEQUAL[family],
        **our_settings,
    )
    their_optimizer = torch.optim.AdamW(
        peft_parameters(theirs).values(), lr=1e-2, weight_decay=0.01
    )
    train_both(theirs, ours, their_optimizer, our_optimizer(ours, lr=1e-2, weight_decay=0.01))
