"""Every variant that PEFT has too, by the settings that its own file gives PEFT: none is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import PEFT_ABOUT_ITSELF, peft_model
from support.tiny_models import FAMILIES, UNEQUAL
from support.tolerance import T0
from support.variants import in_peft, pefts_config
from torch import nn

from loratune.adapters.config import Kernel, LayerKind, LayerShape
from loratune.adapters.optimizer import OptimizerSettings
from loratune.adapters.registry import adapter_class, config_class, variant_names
from loratune.config.schema import TargetsConfig
from loratune.surgery import WrappedModel, wrap_model
from parity.side_by_side import STEPS, one_backward

pytestmark = [
    *PEFT_ABOUT_ITSELF,
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning"),
]
SEED = 11


CASES = [
    (variant, family)
    for variant in variant_names()
    for family in FAMILIES
    if in_peft(variant, family)
]


def pairs(ours: WrappedModel, theirs: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Every tensor of an adapter beside PEFT's; what ours freezes is frozen there."""
    named = dict(theirs.named_parameters())
    found: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for layer, adapter in ours.adapters.items():
        for suffix, tensor in adapter.adapter_tensors().items():
            part, _, rest = suffix.partition(".")
            own = f"base_model.model.{layer}.{part}.default"
            other = next(
                named[name] for name in (f"{own}.{rest}", f"{own}.weight", own) if name in named
            )
            assert isinstance(tensor, nn.Parameter)
            other.requires_grad_(tensor.requires_grad)
            found[f"{layer}.{suffix}"] = (tensor, other)
    return found


def optimizer_of(
    ours: WrappedModel, own: dict[nn.Parameter, nn.Parameter]
) -> torch.optim.Optimizer:
    """PyTorch's AdamW over PEFT's tensors in the groups that the variant makes of its own."""
    settings = OptimizerSettings(lr=1e-2, weight_decay=0.01)
    groups = adapter_class(ours.config.variant).param_groups(ours.model, ours.config, settings)
    return torch.optim.AdamW(
        [{**group, "params": [own[p] for p in group["params"]]} for group in groups], lr=1e-2
    )


@pytest.mark.parametrize(("variant", "family"), CASES)
def test_loss_gradients_and_weights_equal_pefts_through_twenty_steps(
    variant: str, family: str
) -> None:
    config = config_class(variant)(kernel=Kernel.reference)
    theirs = peft_model(FAMILIES[family](), pefts_config(variant, UNEQUAL[family]), SEED)
    ours = wrap_model(FAMILIES[family](), config, TargetsConfig(modules=UNEQUAL[family]), seed=SEED)
    tensors = pairs(ours, theirs)
    settings = OptimizerSettings(lr=1e-2, weight_decay=0.01)
    optimizer = adapter_class(variant).make_optimizer(ours.model, config, settings)
    other_optimizer = optimizer_of(ours, dict(tensors.values()))
    start = {name: own.detach().clone() for name, (own, _) in tensors.items()}
    for step in range(STEPS):
        losses = [
            one_backward(model, stepper, step)
            for model, stepper in ((ours.model, optimizer), (theirs, other_optimizer))
        ]
        T0.check(losses[0], losses[1], f"loss of step {step}")
        for name, (own, other) in tensors.items():
            if own.requires_grad:
                assert own.grad is not None and other.grad is not None, name
                T0.check(own.grad, other.grad, f"gradient of {name} in step {step}")
        optimizer.step()
        other_optimizer.step()
        for name, (own, other) in tensors.items():
            T0.check(own.detach(), other.detach(), f"{name} after step {step}")
    for name, (own, _) in tensors.items():
        assert own.requires_grad is not bool(torch.equal(own, start[name])), name


def test_a_variant_that_peft_has_not_says_so() -> None:
    """Each is in PEFT for an ordinary layer, or gives the reason; PEFT knows what it is called."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    shape = LayerShape("layer", LayerKind.linear, 32, 32)
    for variant in variant_names():
        config = config_class(variant)()
        known = config.peft_type in {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
        assert known is not bool(config.why_not_in_peft(shape)), variant
