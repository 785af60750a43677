"""VeRA against PEFT 0.21.2: equal to the bit, over layers of unequal shapes."""

from __future__ import annotations

import pytest
import torch
from support.peft_oracle import (
    PEFT_ABOUT_ITSELF,
    our_optimizer,
    peft_parameters,
    vera_config,
)
from support.tiny_models import FAMILIES, UNEQUAL
from support.tolerance import T0

from loratune.adapters.vera.module import VeRA
from parity.side_by_side import both_models, train_both

pytestmark = PEFT_ABOUT_ITSELF
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.case(27, T0)
@families
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_gradients_and_weights_equal_pefts_through_twenty_steps(
    family: str, dropout: float
) -> None:
    theirs, ours = both_models(
        FAMILIES[family](),
        vera_config(
            r=8, target_modules=UNEQUAL[family], vera_dropout=dropout, projection_prng_key=5
        ),
        "vera",
        UNEQUAL[family],
        rank=8,
        dropout=dropout,
        projection_seed=5,
    )
    shapes = {(layer.in_features, layer.out_features) for layer in ours.adapters.values()}
    assert len(shapes) > 1
    optimizers = (
        torch.optim.AdamW(peft_parameters(theirs).values(), lr=2e-2, weight_decay=0.01),
        our_optimizer(ours, lr=2e-2, weight_decay=0.01),
    )
    train_both(theirs, ours, *optimizers)


@pytest.mark.case(13, T0)
@families
@pytest.mark.parametrize("key", [0, 42])
def test_the_shared_matrices_are_pefts_and_as_wide_as_the_widest_layer(
    family: str, key: int
) -> None:
    theirs, ours = both_models(
        FAMILIES[family](),
        vera_config(r=8, target_modules=UNEQUAL[family], projection_prng_key=key),
        "vera",
        UNEQUAL[family],
        rank=8,
        projection_seed=key,
    )
    layers = [layer for layer in ours.adapters.values() if isinstance(layer, VeRA)]
    projection = layers[0].projection
    T0.check(projection.vera_A, theirs.base_model.vera_A["default"])
    T0.check(projection.vera_B, theirs.base_model.vera_B["default"])
    assert projection.vera_A.shape == (8, max(layer.in_features for layer in layers))
    assert projection.vera_B.shape == (max(layer.out_features for layer in layers), 8)
    assert all(layer.projection is projection for layer in layers)
