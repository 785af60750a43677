"""Every variant on a base in 4 or 8 bits, against PEFT on the same numbers in its own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.peft_oracle import (
    PEFT_ABOUT_ITSELF,
    ia3_config,
    lora_config,
    oft_config,
    our_model,
    our_parameters,
    peft_model,
    peft_parameters,
    vera_config,
)
from support.quantized import ABOUT_ITSELF, quantized_model, wide_base, with_plain_layers
from support.tiny_models import token_ids

pytestmark = [*PEFT_ABOUT_ITSELF, *ABOUT_ITSELF]

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
TOLERANCE = 1e-5
"""Of the largest gradient of a tensor: bitsandbytes adds in another order."""
FEEDFORWARD = ["down_proj"]

VARIANTS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "lora": (lora_config, {"r": 4, "lora_alpha": 8}, {"rank": 4, "alpha": 8.0}),
    "lora_fa": (lora_config, {"r": 4, "lora_alpha": 8}, {"rank": 4, "alpha": 8.0}),
    "lora_plus": (lora_config, {"r": 4, "lora_alpha": 8}, {"rank": 4, "alpha": 8.0}),
    "dora": (lora_config, {"r": 4, "lora_alpha": 8, "use_dora": True}, {"rank": 4, "alpha": 8.0}),
    "vera": (vera_config, {"r": 16, "projection_prng_key": 3}, {"rank": 16, "projection_seed": 3}),
    "ia3": (ia3_config, {"feedforward_modules": FEEDFORWARD}, {}),
    "oft": (oft_config, {"oft_block_size": 32}, {}),
}


@pytest.fixture(scope="module", params=["nf4", "nf4 double", "fp4", "int8"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return quantized_model(wide_base(tmp_path_factory.mktemp("base")), request.param)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_pefts_on_the_same_quantized_base(
    base: Any, variant: str, kernel: str
) -> None:
    make_config, their_settings, our_settings = VARIANTS[variant]
    targets = TARGETS
    theirs = peft_model(
        with_plain_layers(base), make_config(target_modules=targets, **their_settings), seed=5
    )
    extra = {"feedforward_layers": FEEDFORWARD} if variant == "ia3" else {}
    ours = our_model(
        copy.deepcopy(base), variant, targets, seed=5, kernel=kernel, **our_settings, **extra
    )
    own, given = our_parameters(ours), peft_parameters(theirs)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(own.items()):
            torch.manual_seed(number)
            parameter.add_(0.05 * torch.randn_like(parameter))
            given[name].copy_(parameter)
    ids = token_ids(3)
    losses = [
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        for model in (ours.model, theirs)
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=TOLERANCE, atol=0)
    for name, parameter in own.items():
        got, expected = parameter.grad, given[name].grad
        assert got is not None and expected is not None and expected.any(), name
        limit = TOLERANCE * float(expected.abs().max())
        assert float((got - expected).abs().max()) <= limit, name


def test_a_model_that_another_library_quantized_is_adapted_as_it_is(base: Any) -> None:
    """Bitsandbytes' own layers, used once before, as transformers leaves them."""
    theirs, ids = with_plain_layers(base), token_ids(3)
    theirs.train()(input_ids=ids, use_cache=False)
    settings = {"seed": 5, "rank": 4, "init": "random"}
    results = []
    for model in (theirs, copy.deepcopy(base)):
        wrapped = our_model(model, "lora", TARGETS, **settings)
        results.append(wrapped.model.eval()(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*results)
